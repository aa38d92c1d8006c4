"""ONNX Runtime's GPU build without a GPU: a module that pretends to have its providers and computes with the real CPU one.

``make_onnxruntime(machine)`` gives the module; its device memory is that of tests/fake_cuda. What a session does with bound
memory is queued on the stream it was given, or on one of its own, and runs late, so a caller that does not order its work
reads garbage and is told of a race. What ONNX Runtime refuses raises its words here too; what it would do wrong without a
word is noted in ``Machine.problems``: a replay with other addresses than were recorded, recording in several threads,
addresses that are not aligned, an input of the CPU that is bound before it is written, a session that outlives its stream
or is let go of under its work.

Names of options were read off the libraries of onnxruntime-gpu 1.31.1 and onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as real

from lp_edge.tests.fake_cuda.device import H200, FakeCuda

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"

_STREAM = "device_id user_compute_stream has_user_compute_stream "
OPTIONS = {
    CPU: set(),
    CUDA: set(
        (
            _STREAM + "gpu_external_alloc gpu_external_free gpu_external_empty_cache gpu_mem_limit arena_extend_strategy "
            "cudnn_conv_algo_search do_copy_in_default_stream cudnn_conv_use_max_workspace enable_cuda_graph "
            "cudnn_conv1d_pad_to_nc1d enable_cudnn tunable_op_enable tunable_op_tuning_enable "
            "tunable_op_max_tuning_duration_ms prefer_nhwc use_ep_level_unified_stream use_tf32 sdpa_kernel fuse_conv_bias"
        ).split()
    ),
    TENSORRT: set(
        (
            _STREAM + "trt_max_partition_iterations trt_min_subgraph_size trt_max_workspace_size trt_fp16_enable "
            "trt_bf16_enable trt_int8_enable trt_dla_enable trt_dla_core trt_dump_subgraphs trt_engine_cache_enable "
            "trt_engine_cache_path trt_engine_cache_prefix trt_timing_cache_enable trt_timing_cache_path "
            "trt_force_timing_cache trt_detailed_build_log trt_builder_optimization_level trt_auxiliary_streams "
            "trt_tactic_sources trt_extra_plugin_lib_paths trt_profile_min_shapes trt_profile_max_shapes "
            "trt_profile_opt_shapes trt_cuda_graph_enable trt_engine_hw_compatible trt_op_types_to_exclude"
        ).split()
    ),
    RTX: set(
        (
            _STREAM + "user_aux_stream_array nv_max_workspace_size nv_max_shared_mem_size nv_length_aux_stream_array "
            "nv_dump_subgraphs nv_detailed_build_log nv_profile_min_shapes nv_profile_max_shapes nv_profile_opt_shapes "
            "enable_cuda_graph nv_multi_profile_enable nv_use_external_data_initializer nv_runtime_cache_path "
            "nv_op_types_to_exclude nv_enable_profiling nv_use_sync_gpu_allocator nv_persistent_context_memory"
        ).split()
    ),
}  # fmt: skip


@dataclass
class Machine:
    """The machine around the module, and what goes wrong on it.

    Attributes:
        cuda: the device.
        available: providers of the build.
        gpus: that the plugin of TensorRT-RTX finds.
        version: of ONNX Runtime.
        unknown: options that the providers do not have, although this version's do.
        elsewhere: operators that run on another provider.
        host_inputs, host_outputs: what the CPU reads and writes.
        tells_memory, tells_nodes: whether the version has the calls that tell them.
        open_errors: words for the next sessions, which do not open. run_errors: the same for calls.
        refuses_profile: the network is taken in parts, so that a profile of its inputs is not enough.
        opened: providers with their options of all sessions, of those that failed as well.
        session_options: of all sessions.
        runs: configuration entries of all calls.
        during_record: called while a launch is recorded, for which CUDA is in its global mode.
        recorded, replayed: calls that did.
        problems: what was done wrong so far.
    """

    cuda: FakeCuda = field(default_factory=lambda: FakeCuda(H200))
    available: tuple[str, ...] = (TENSORRT, CUDA, CPU)
    gpus: int = 1
    version: str = "1.31.1"
    unknown: tuple[str, ...] = ()
    elsewhere: dict[str, str] = field(default_factory=dict)
    host_inputs: tuple[str, ...] = ()
    host_outputs: tuple[str, ...] = ()
    tells_memory: bool = True
    tells_nodes: bool = True
    open_errors: list[str] = field(default_factory=list)
    run_errors: list[str] = field(default_factory=list)
    refuses_profile: bool = False
    opened: list[list[tuple[str, dict[str, str]]]] = field(default_factory=list)
    session_options: list[Any] = field(default_factory=list)
    runs: list[dict[str, str]] = field(default_factory=list)
    during_record: Callable[[], None] | None = None
    recorded: int = 0
    replayed: int = 0
    registered: bool = False
    problems: list[str] = field(default_factory=list)

    def verify(self) -> None:
        """AssertionError with everything that was done wrong, here and on the device."""
        assert not self.problems, "\n".join(self.problems)
        self.cuda.verify()


class SessionOptions:
    __slots__ = (
        "enable_mem_pattern", "entries", "inter_op_num_threads", "intra_op_num_threads", "log_severity_level", "providers",
    )  # fmt: skip

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.providers: list[tuple[str, dict[str, str]]] = []
        self.enable_mem_pattern = True

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def add_provider_for_devices(self, devices: Sequence[Any], options: dict[str, str]) -> None:
        if not devices:
            raise RuntimeError(
                "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Must provide one or more OrtEpDevice instances."
            )
        self.providers = [(devices[0].ep_name, dict(options)), (CPU, {})]


class RunOptions:
    __slots__ = ("entries", "log_severity_level")

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class Value:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array


@dataclass
class Bound:
    """Memory with an address; ``array`` where it is on the host."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pointer: int = 0
    array: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def _numpy(text: str) -> np.dtype:
    kind = text[len("tensor(") : -1]
    return np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))


class Binding:
    def __init__(self, session: Any) -> None:
        self._session, self._machine = session, session._machine
        self.inputs: dict[str, Bound] = {}
        self.outputs: dict[str, Bound | None] = {}
        self.made: dict[str, np.ndarray] = {}

    def _at(self, device_type: str, device_id: int, element_type: Any, shape: Any, pointer: int) -> Bound:
        machine = self._machine
        assert device_type == "cuda" and type(pointer) is int and pointer > 0, (device_type, pointer)
        bound = Bound(tuple(shape), np.dtype(element_type), pointer)
        if device_id != self._session._device:
            machine.problems.append(f"memory of device {device_id} bound on device {self._session._device}")
        if pointer % 256:
            machine.problems.append(f"address {pointer:#x} is not aligned")
        machine.cuda.view(pointer, bound.nbytes)  # it must be an address, and reach that far
        return bound

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        bound = self._at(device_type, device_id, element_type, shape, buffer_ptr)
        if name in self._machine.host_inputs:
            memory, _ = self._machine.cuda._find(buffer_ptr, host=False)
            if memory.pending_writes:
                self._machine.problems.append(f"{name} is copied to the CPU before it was written")
            bound.array = self._machine.cuda.view(buffer_ptr, bound.nbytes).view(bound.dtype).copy()
            bound.array = bound.array.reshape(bound.shape)
        self.inputs[name] = bound

    def bind_cpu_input(self, name: str, arr_on_cpu: np.ndarray) -> None:
        assert type(arr_on_cpu) is np.ndarray and arr_on_cpu.flags.c_contiguous
        self.inputs[name] = Bound(arr_on_cpu.shape, arr_on_cpu.dtype, array=arr_on_cpu)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Any = None,
        buffer_ptr: int | None = None,
    ) -> None:
        if buffer_ptr is None:
            assert device_type == "cpu"
            self.outputs[name] = None
        else:
            self.outputs[name] = self._at(device_type, device_id, element_type, shape, buffer_ptr)

    def get_outputs(self) -> list[Value]:
        return [Value(self.made.get(name, np.zeros(0))) for name in self.outputs]


@dataclass
class Record:
    inputs: dict[str, Bound]
    outputs: dict[str, Bound | None]


class InferenceSession:
    _machine: Machine

    def __init__(self, model: Any, options: Any, providers: Any = None, enable_fallback: int = 1) -> None:
        machine = self._machine
        assert enable_fallback == 0, "ONNX Runtime would replace the provider by itself"
        assert type(options) is SessionOptions
        if RTX not in machine.available and any(name == RTX for name, _ in providers or ()):
            raise AssertionError("a plugin is given by its devices")
        self._providers = options.providers if providers is None else [(n, dict(o)) for n, o in providers]
        machine.opened.append([(name, dict(chosen)) for name, chosen in self._providers])
        machine.session_options.append(options)
        name, chosen = self._providers[0]
        if machine.open_errors:
            raise RuntimeError(machine.open_errors.pop(0))
        for provider, given in self._providers:
            for option, value in given.items():
                assert type(value) is str, (option, value)
                if option not in OPTIONS[provider] or option in machine.unknown:
                    words = f'Unknown provider option: "{option}".'
                    if provider == TENSORRT:
                        words = f"Invalid TensorRT EP option: {option}"
                    raise RuntimeError(f"/src/state.cc:12 void f(A&) {words}")
        if machine.refuses_profile and any("profile" in option for option in chosen):
            raise RuntimeError(
                "User needs to provide all the dynamic shape inputs with associated profiles if they want to explicitly set "
                "profiles through provider options."
            )
        plain = real.SessionOptions()
        plain.intra_op_num_threads = 1
        plain.log_severity_level = 4
        plain.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._real = real.InferenceSession(model, plain, providers=[CPU])
        self._name, self._device = name, int(chosen.get("device_id", 0))
        self._graph = name != CPU and "1" in (
            chosen.get("enable_cuda_graph"), chosen.get("trt_cuda_graph_enable", "")[:4].replace("True", "1"),
        )  # fmt: skip
        if self._graph and machine.elsewhere:
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user  as all compute graph nodes have "
                f"not been partitioned to the {name}"
            )
        if self._graph and options.enable_mem_pattern:
            machine.problems.append("memory is allocated in the run that is recorded")
        self._records: dict[int, Record] = {}
        self._threads: set[int] = set()
        self._busy = threading.Lock()
        self._stream = 0
        if name != CPU and "user_compute_stream" in chosen:
            self._stream = int(chosen["user_compute_stream"])
            assert chosen.get("has_user_compute_stream", "1") == "1"
            assert name != RTX or "has_user_compute_stream" in chosen
            weakref.finalize(self, _ended, machine, self._stream)

    def get_providers(self) -> list[str]:
        return [name for name, _ in self._providers]

    def get_inputs(self) -> Any:
        return self._real.get_inputs()

    def get_outputs(self) -> Any:
        return self._real.get_outputs()

    def _memory(self, nodes: Any, on_host: tuple[str, ...]) -> list[Any]:
        if not self._machine.tells_memory:
            raise AttributeError("get_input_memory_infos")
        return [
            SimpleNamespace(
                name="Cpu" if node.name in on_host else "Cuda", device_mem_type="OrtDeviceMemoryType.DEFAULT"
            )
            for node in nodes
        ]

    def get_input_memory_infos(self) -> list[Any]:
        return self._memory(self.get_inputs(), self._machine.host_inputs)

    def get_output_memory_infos(self) -> list[Any]:
        return self._memory(self.get_outputs(), self._machine.host_outputs)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        if not self._machine.tells_nodes:
            raise RuntimeError("not recorded")
        found: dict[str, list[Any]] = {}
        for part in self._real.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                found.setdefault(self._machine.elsewhere.get(node.op_type, self._name), []).append(node)
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda nodes=nodes: nodes)
            for name, nodes in found.items()
        ]

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        if self._machine.run_errors:
            raise RuntimeError(self._machine.run_errors.pop(0))
        return self._real.run(output_names, input_feed)

    def io_binding(self) -> Binding:
        return Binding(self)

    # -- with bound memory --------------------------------------------------------------------------

    def run_with_iobinding(self, binding: Binding, run_options: Any) -> None:
        machine, entries = self._machine, dict(run_options.entries)
        machine.runs.append(entries)
        assert run_options.log_severity_level == 4, "errors would be on the terminal"
        assert binding._session is self
        if machine.run_errors:
            raise RuntimeError(machine.run_errors.pop(0))
        missing = {node.name for node in self.get_inputs()} - set(binding.inputs)
        if missing or not binding.outputs:
            raise RuntimeError(f"Missing Input: {missing}, or no output is requested")
        shapes = self._check(binding)
        machine.cuda("cudaSetDevice", self._device)
        stream = self._stream or self._own_stream()
        wait = entries.get("disable_synchronize_execution_providers") != "1"
        if None in binding.outputs.values() and not wait:
            machine.problems.append("results on the host are asked for without waiting")
        if not self._busy.acquire(blocking=not self._graph):
            machine.problems.append("two threads in a session with CUDA graphs")
            return
        try:
            self._launch(binding, shapes, stream, int(entries.get("gpu_graph_id", "0")), wait)
        finally:
            self._busy.release()

    def _own_stream(self) -> int:
        status, stream = self._machine.cuda("cudaStreamCreateWithFlags", 1)
        assert not status
        return stream

    def _check(self, binding: Binding) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs; what ONNX Runtime says where those of the memory differ."""
        kinds = {node.name: _numpy(node.type) for node in self.get_inputs()}
        zeros = {name: np.zeros(bound.shape, kinds[name]) for name, bound in binding.inputs.items()}
        assert all(bound.dtype == kinds[name] for name, bound in binding.inputs.items())
        results = self._real.run(list(binding.outputs), zeros)
        for (name, bound), result in zip(binding.outputs.items(), results, strict=True):
            if bound is not None and (bound.shape != result.shape or bound.dtype != result.dtype):
                raise RuntimeError(
                    f"The output OrtValue provided for output '{name}' has shape {bound.shape} but the computed output shape "
                    f"for this run is {result.shape}."
                )
        return {name: result.shape for name, result in zip(binding.outputs, results, strict=True)}

    def _launch(self, binding: Binding, shapes: Any, stream: int, number: int, wait: bool) -> None:
        machine = self._machine
        work = Record(dict(binding.inputs), dict(binding.outputs))
        if self._graph and number != -1:
            number = 0 if self._name == TENSORRT else number  # it has one graph, whatever is asked for
            self._threads.add(threading.get_ident())
            if len(self._threads) > 1:
                machine.problems.append("graphs are recorded anew in every thread")
            if number in self._records:
                recorded = self._records[number]
                if recorded != work:
                    machine.problems.append(f"graph {number} was recorded with other addresses or shapes")
                work = recorded
                machine.replayed += 1
            else:
                self._records[number] = work
                machine.recorded += 1
                with machine.cuda.recording(stream):
                    if machine.during_record is not None:
                        machine.during_record()

        compute, made = self._real, binding.made  # queued work keeps no session

        def run() -> None:
            feeds = {
                name: bound.array
                if bound.array is not None
                else machine.cuda.view(bound.pointer, bound.nbytes)
                .view(bound.dtype)
                .reshape(bound.shape)
                .copy()
                for name, bound in work.inputs.items()
            }
            results = compute.run(list(work.outputs), feeds)
            for (name, bound), result in zip(work.outputs.items(), results, strict=True):
                if bound is None:
                    made[name] = result
                else:
                    data = np.ascontiguousarray(result).reshape(-1).view(np.uint8)
                    machine.cuda.view(bound.pointer, bound.nbytes)[:] = data

        reads = [(b.pointer, b.nbytes) for b in work.inputs.values() if b.array is None]
        writes = [(b.pointer, b.nbytes) for b in work.outputs.values() if b is not None]
        status = machine.cuda.enqueue(stream, "ONNX Runtime", run, reads=reads, writes=writes)
        if not status and wait:
            status = machine.cuda("cudaStreamSynchronize", stream)[0]
        if stream != self._stream:
            machine.cuda("cudaStreamDestroy", stream)
        if status:
            raise RuntimeError(f"CUDA failure {status}: an illegal memory access was encountered")


def _ended(machine: Machine, stream: int) -> None:
    if (found := machine.cuda._objects.get(stream)) is None:
        machine.problems.append("a session outlived the stream on which it works")
    elif any(getattr(item, "label", "") == "ONNX Runtime" for item in found.queue):
        machine.problems.append("a session was let go of while its work was queued")


def make_onnxruntime(machine: Machine) -> ModuleType:
    """A module ``onnxruntime`` for the machine."""
    module = ModuleType("onnxruntime")

    def register(name: str, path: str) -> None:
        if machine.registered:
            raise RuntimeError(f"library {path} is already registered")
        machine.registered = True

    def devices() -> list[Any]:
        found = [SimpleNamespace(ep_name=CPU)]
        if machine.registered:
            found += [SimpleNamespace(ep_name=RTX) for _ in range(machine.gpus)]
        return found

    session = type("InferenceSession", (InferenceSession,), {"_machine": machine})
    if not machine.tells_memory:  # an older version
        session.get_input_memory_infos = session.get_output_memory_infos = property(_missing)
    vars(module).update(
        __version__=machine.version,
        __file__="/nonexistent/onnxruntime/__init__.py",
        InferenceSession=session,
        RunOptions=RunOptions,
        SessionOptions=SessionOptions,
        get_available_providers=lambda: list(machine.available),
        get_ep_devices=devices,
        preload_dlls=lambda: print("Failed to load libcudnn.so.9"),
        register_execution_provider_library=register,
        set_default_logger_severity=lambda level: None,
    )
    return module


def _missing(self: Any) -> Any:
    raise AttributeError("this ONNX Runtime does not have it")
