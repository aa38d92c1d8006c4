"""What this machine has and lacks: versions, hardware, backends and encoders that were tried, the built-in bundle.

Nothing here is taken on trust where trying is cheap: a backend counts as working when it ran a network with the right
numbers, an encoder when it encoded a frame, a bundle when all hashes fit and its networks could be opened.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from lp_edge.engines.backends import BackendConfig, BackendStatus, available_backends
from lp_edge.engines.bundle import open_bundle
from lp_edge.engines.ort import CUDA, import_onnxruntime
from lp_edge.errors import LpEdgeError
from lp_edge.runtime.families import open_family
from lp_edge.runtime.requirements import Requirement, examine_requirements

__all__ = [
    "BundleStatus",
    "Component",
    "EncoderStatus",
    "Gpu",
    "Machine",
    "Missing",
    "Report",
    "VideoStatus",
    "examine",
    "examine_bundle",
    "examine_components",
    "examine_encoders",
    "examine_machine",
    "examine_video",
    "fitting_backends",
    "fitting_video",
    "lp_edge_version",
]

_REINSTALL: Final = "pip install --force-reinstall lp-edge"
_TIMEOUT: Final = 10.0


@dataclass(frozen=True)
class Component:
    """A piece of software.

    Attributes:
        name: what people call it.
        version: as it states it itself; None when it is not there or cannot be imported.
        needed: whether lp-edge cannot do its main job without it.
        use: what it is for.
        problem: what is wrong, or "".
        remedy: what to do about it, or "".
    """

    name: str
    version: str | None
    needed: bool
    use: str
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; what could not be found out is ""."""

    name: str
    memory_mib: int | None = None
    driver: str = ""
    compute_capability: str = ""


@dataclass(frozen=True)
class Machine:
    """The hardware.

    Attributes:
        system: operating system and kernel.
        cpu: model name, or the architecture.
        cores: cores that this process may use.
        memory_mib: physical memory; None when unknown.
        gpus: NVIDIA GPUs that the driver shows.
        driver: version of the NVIDIA driver, or "".
        jetson: model and release of a Jetson, or "".
    """

    system: str
    cpu: str
    cores: int
    memory_mib: int | None
    gpus: tuple[Gpu, ...]
    driver: str
    jetson: str


@dataclass(frozen=True)
class EncoderStatus:
    """Whether an encoder of PyAV encoded a frame."""

    name: str
    works: bool
    needed: bool
    use: str
    detail: str
    remedy: str


@dataclass(frozen=True)
class VideoStatus:
    """Whether hardware decoded a clip as software does, or encoded a frame that software can decode.

    Attributes:
        name: decoder or encoder.
        role: which of the two.
        kind: its name for ``--decoder`` and ``--encoder``.
        works: it was tried and did it.
        detail: what it did, or why not.
        remedy: what to do about it, or "".
    """

    name: str
    role: Literal["decode", "encode"]
    kind: str
    works: bool
    detail: str
    remedy: str


@dataclass(frozen=True)
class BundleStatus:
    """Whether a bundle is whole and every network in it opens on the CPU."""

    path: str
    works: bool
    detail: str
    remedy: str


@dataclass(frozen=True)
class Missing:
    """Something that is not as it could be. ``needed``: the main job does not work without it."""

    what: str
    remedy: str
    needed: bool


@dataclass(frozen=True)
class Report:
    """Everything that :func:`examine` found."""

    components: tuple[Component, ...]
    machine: Machine
    backends: tuple[BackendStatus, ...]
    encoders: tuple[EncoderStatus, ...]
    bundle: BundleStatus
    requirements: tuple[Requirement, ...] = ()
    video: tuple[VideoStatus, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the main job works here."""
        return not any(entry.needed for entry in self.missing())

    def missing(self) -> list[Missing]:
        """What is missing and how to get it, what is needed first.

        A GPU backend and video hardware count as missing only where there is a GPU and something can be done about it; one way
        to use it is enough. A backend is left out where the requirement that it lacks is in the list already.
        """
        found = [
            Missing(c.problem or f"{c.name} is not installed ({c.use})", c.remedy, c.needed)
            for c in self.components
            if c.problem or c.version is None
        ]
        any_works = any(b.works for b in self.backends)
        gpu = bool(self.machine.gpus or self.machine.jetson)
        told = {r.name for r in self.requirements if r.severity == "error"}
        found += [
            Missing(b.detail, b.remedy, b.name == "cpu" and not any_works)
            for b in self.backends
            if not b.works and (b.name == "cpu" or (gpu and b.remedy and _LACKS.get(b.name) not in told))
        ]
        found += [
            Missing(f"encoder {e.name} ({e.use}): {e.detail}", e.remedy, e.needed)
            for e in self.encoders
            if not e.works
        ]
        found += [
            Missing(
                f"{r.name}: {r.got}" + (f"; expected {r.expected}" if r.expected else ""), r.remedy, False
            )
            for r in self.requirements
            if r.severity == "error"
        ]
        if gpu:
            found += self._missing_video()
        if not self.bundle.works:
            found.append(Missing(self.bundle.detail, self.bundle.remedy, True))
        return sorted(found, key=lambda entry: not entry.needed)

    def _missing_video(self) -> Iterator[Missing]:
        wanted = "gstreamer" if self.machine.jetson else "nvidia"
        for role in ("decode", "encode"):
            tried = [v for v in self.video if v.role == role]
            if tried and not any(v.works for v in tried):
                ways = [v for v in tried if v.kind == wanted and v.remedy]
                if not ways:  # a GPU without such hardware
                    continue
                why = "; ".join(f"{v.name}: {v.detail}" for v in ways)
                yield Missing(f"no hardware {role}s video ({why})", ways[0].remedy, False)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for JSON, with ``ok`` and ``missing``."""
        return {"ok": self.ok, **asdict(self), "missing": [asdict(entry) for entry in self.missing()]}


# -- software ---------------------------------------------------------------------------------------


def lp_edge_version() -> str | None:
    """Version of the installed lp-edge; None when it runs from a folder that was never installed."""
    return _distribution("lp-edge")


def _distribution(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _imported(name: str, module: str, use: str, remedy: str) -> Component:
    """A needed component, tried by importing it: a missing system library shows only then."""
    try:
        version = str(importlib.import_module(module).__version__)
    except Exception as error:  # noqa: BLE001 - a broken native library raises anything
        return Component(name, None, True, use, f"{name} cannot be imported ({error})", remedy)
    return Component(name, version, True, use)


def _optional(name: str, distribution: str, use: str, remedy: str) -> Component:
    """An optional component, looked up without importing it."""
    version = _distribution(distribution)
    return Component(name, version, False, use, "", "" if version else remedy)


def examine_components() -> tuple[Component, ...]:
    """Versions of what lp-edge is made of."""
    version = lp_edge_version()
    own = Component("lp-edge", version, False, "this program", "", "" if version else "pip install lp-edge")
    python = Component("Python", platform.python_version(), True, "runs everything")
    ort = _imported("ONNX Runtime", "onnxruntime", "runs the networks", "pip install onnxruntime")
    both = ort.version and _distribution("onnxruntime") and _distribution("onnxruntime-gpu")
    if both and CUDA not in import_onnxruntime().get_available_providers():
        problem = "onnxruntime has overwritten onnxruntime-gpu: both are installed, and the CPU build won"
        remedy = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"
        ort = replace(ort, needed=False, problem=problem, remedy=remedy)
    return (
        own,
        python,
        _imported("NumPy", "numpy", "arrays", "pip install numpy"),
        _imported("OpenCV", "cv2", "pictures", "pip install opencv-python-headless"),
        _imported("PyAV", "av", "video and audio", "pip install av"),
        ort,
        _optional("PyTorch", "torch", "lp-export", "pip install 'lp-edge[export]'"),
        _optional("ONNX", "onnx", "lp-export", "pip install 'lp-edge[export]'"),
    )


# -- hardware ---------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace").replace("\0", " ").strip()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    """First value of ``name : value`` lines, case ignored."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip().lower() == name.lower():
            return value.strip()
    return ""


def _nvidia_smi() -> tuple[Gpu, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    # older drivers do not know compute_cap and refuse the whole query
    for fields in ("name,memory.total,driver_version,compute_cap", "name,memory.total,driver_version"):
        command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except (OSError, subprocess.SubprocessError):
            return ()
        if done.returncode == 0:
            return tuple(_gpu_of(line) for line in done.stdout.splitlines() if line.strip())
    return ()


def _gpu_of(line: str) -> Gpu:
    name, memory, driver, capability = ([part.strip() for part in line.split(",")] + [""] * 4)[:4]
    return Gpu(name, int(memory) if memory.isdigit() else None, driver, capability)


def _gpus(root: Path) -> tuple[Gpu, ...]:
    # without the tool (slim containers) the driver's own files still tell
    driver = _driver(root)
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    shown = tuple(Gpu(_field(_read(file), "Model") or "NVIDIA GPU", None, driver) for file in files)
    return _nvidia_smi() or shown


def _driver(root: Path) -> str:
    """Version in a line such as ``NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  <date>``."""
    for word in _field(_read(root / "proc/driver/nvidia/version"), "NVRM version").split():
        if word[0].isdigit() and "." in word:
            return word
    return ""


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def examine_machine(root: Path = Path("/")) -> Machine:
    """The hardware, read from ``/proc``, ``/etc`` and ``nvidia-smi`` where there is one.

    Args:
        root: where ``proc`` and ``etc`` are.
    """
    memory = _field(_read(root / "proc/meminfo"), "MemTotal").split()
    release = _read(root / "etc/nv_tegra_release").splitlines()
    model = _read(root / "proc/device-tree/model")
    jetson = ", ".join(part for part in (model, release[0].lstrip("# ")) if part) if release else ""
    gpus = _gpus(root)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_field(_read(root / "proc/cpuinfo"), "model name")
        or model
        or platform.processor()
        or platform.machine(),
        cores=_cores(),
        memory_mib=int(memory[0]) // 1024 if memory and memory[0].isdigit() else None,
        gpus=gpus,
        driver=_driver(root) or (gpus[0].driver if gpus else ""),
        jetson=jetson,
    )


# -- encoders ---------------------------------------------------------------------------------------


def _encode_picture(av: Any, name: str) -> int:
    context = av.codec.CodecContext.create(name, "w")
    context.width = context.height = 64
    context.pix_fmt, context.time_base, context.framerate = "yuv420p", Fraction(1, 25), Fraction(25)
    frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 128, np.uint8), format="rgb24").reformat(
        format="yuv420p"
    )
    frame.pts, frame.time_base = 0, Fraction(1, 25)
    return sum(packet.size for packet in [*context.encode(frame), *context.encode(None)])


def _encode_sound(av: Any, name: str) -> int:
    context = av.codec.CodecContext.create(name, "w")
    context.sample_rate, context.layout, context.time_base = 48000, "stereo", Fraction(1, 48000)
    context.format = context.codec.audio_formats[0]
    frame = av.AudioFrame(format=context.format, layout="stereo", samples=960)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
    context.open()
    if context.frame_size and context.frame_size != frame.samples:
        fifo = av.AudioFifo()
        frames = []
        for step in range(3):
            frame.pts = 960 * step
            fifo.write(frame)
        while (piece := fifo.read(context.frame_size)) is not None:
            frames.append(piece)
    else:
        frames = [frame]
    packets = [packet for piece in frames for packet in context.encode(piece)]
    return sum(packet.size for packet in [*packets, *context.encode(None)])


# name, what it writes, whether the main job needs it, how to try it
_ENCODERS: Final[tuple[tuple[str, str, bool, Callable[[Any, str], int]], ...]] = (
    ("libx264", "pictures of .mp4", True, _encode_picture),
    ("aac", "sound of .mp4", True, _encode_sound),
    ("libvpx-vp9", "pictures of .webm", False, _encode_picture),
    ("libopus", "sound of .webm", False, _encode_sound),
)


@contextlib.contextmanager
def _quiet(av: Any) -> Iterator[None]:
    """Keep the codecs' own remarks off the terminal."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.PANIC)
    try:
        yield
    finally:
        av.logging.set_level(level)


def examine_encoders() -> tuple[EncoderStatus, ...]:
    """Encode one frame with every encoder that lp-edge writes with."""
    remedy = "pip install --force-reinstall --no-cache-dir av (its wheels bring the encoder along)"
    try:
        import av
        import av.logging
    except Exception as error:  # noqa: BLE001 - a broken native library raises anything
        return tuple(
            EncoderStatus(name, False, needed, use, f"PyAV cannot be imported ({error})", "pip install av")
            for name, use, needed, _ in _ENCODERS
        )
    statuses = []
    with _quiet(av):
        for name, use, needed, encode in _ENCODERS:
            try:
                size = encode(av, name)
            except Exception as error:  # noqa: BLE001 - whatever it is, the encoder does not work
                statuses.append(EncoderStatus(name, False, needed, use, f"it fails ({error})", remedy))
                continue
            if size > 0:
                statuses.append(
                    EncoderStatus(name, True, needed, use, f"encoded a frame into {size} bytes", "")
                )
            else:
                statuses.append(EncoderStatus(name, False, needed, use, "it gives no data", remedy))
    return tuple(statuses)


# -- video ------------------------------------------------------------------------------------------

_SIDE: Final = 256  # NVENC takes no pictures below about 145x49
_VIDEO_REMEDIES: Final = {
    "NVDEC through PyAV": "install the NVIDIA driver (a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility,video) and "
    "PyAV 15 or later from PyPI",
    "NVENC through PyAV": "install the NVIDIA driver, 570 or later (a container needs NVIDIA_DRIVER_CAPABILITIES=compute,"
    "utility,video), and PyAV 15 or later from PyPI; a GPU without NVENC (A100, H100, H200) needs nothing: software encodes",
    "NVDEC through PyNvVideoCodec": "pip install 'lp-edge[nvcodec]'; the driver must be 530 or later",
    "NVENC through PyNvVideoCodec": "pip install 'lp-edge[nvcodec]'; the driver must be 530 or later, the GPU have NVENC",
    "nvv4l2decoder through GStreamer": "sudo apt install gstreamer1.0-tools nvidia-l4t-gstreamer (Jetson only)",
    "nvv4l2h264enc through GStreamer": "sudo apt install gstreamer1.0-tools nvidia-l4t-gstreamer (Jetson only); Orin Nano has "
    "no NVENC and needs nothing: software encodes",
}


def _test_clip(folder: Path) -> Path:
    """Half a second of moving colours with B pictures, written in software."""
    from lp_edge.runtime.media_write import open_writer

    path = folder / "test.mp4"
    if path.exists():
        return path
    y, x = np.mgrid[:_SIDE, :_SIDE]
    with open_writer(path, (_SIDE, _SIDE), 25) as writer:
        for index in range(12):
            waves = [
                np.sin((x + 5 * index) / 23),
                np.cos((y - 3 * index) / 17),
                np.sin((x + y) / 31 + index / 5),
            ]
            writer.write((np.stack(waves, axis=-1) * 100 + 128).astype(np.uint8))
    return path


def examine_video(device: int = 0) -> tuple[VideoStatus, ...]:
    """Decode a clip and encode a frame with all hardware that lp-edge can use; takes about a second.

    Args:
        device: index of the GPU.

    Returns:
        One entry for each decoder and encoder; none where PyAV cannot be imported.
    """
    try:
        from lp_edge.runtime import hardware_video
    except Exception:  # noqa: BLE001 - a broken native library raises anything; the components tell of it
        return ()
    statuses: list[VideoStatus] = []

    def tried(name: str, role: Literal["decode", "encode"], kind: str, attempt: Callable[[], str]) -> None:
        try:
            status = VideoStatus(name, role, kind, True, attempt(), "")
        except LpEdgeError as error:
            status = VideoStatus(name, role, kind, False, error.got, _VIDEO_REMEDIES[name])
        statuses.append(status)

    def decode(decoder: hardware_video.Decoder) -> str:
        count = hardware_video.try_decoder(decoder, _test_clip(Path(folder)), device)
        return f"decoded {count} frames as software does"

    def encode(encoder: hardware_video.Encoder) -> str:
        size = len(
            hardware_video.try_encoder(encoder, (_SIDE, _SIDE), Fraction(25), 18, device, explain=True)
        )
        return f"encoded a frame into {size} bytes"

    with tempfile.TemporaryDirectory(prefix="lp-doctor-") as folder:
        for decoder in hardware_video.DECODERS:
            tried(decoder.name, "decode", decoder.kind, partial(decode, decoder))
    for encoder in hardware_video.ENCODERS:
        tried(encoder.name, "encode", encoder.kind, partial(encode, encoder))
    return tuple(statuses)


# -- what fits this machine ---------------------------------------------------------------------------

# Backend -> the requirement whose remedy is that of the backend, for the very driver, Python or JetPack.
_LACKS: Final = {"cuda": "onnxruntime-gpu", "ort-tensorrt": "onnxruntime-gpu", "tensorrt": "TensorRT"}
_NO_NVENC: Final = re.compile(r"Orin Nano|\b(A100|H100|H200)\b")


def _takes_rtx(machine: Machine) -> bool:
    """TensorRT-RTX is for GeForce and RTX cards, Ampere or newer."""
    return any(
        "RTX" in gpu.name and (not gpu.compute_capability or float(gpu.compute_capability) >= 8)
        for gpu in machine.gpus
    )


def fitting_backends(
    backends: Sequence[BackendStatus], machine: Machine, requirements: Sequence[Requirement]
) -> tuple[BackendStatus, ...]:
    """What was found about backends, with remedies for this machine: "" where its GPU cannot use the backend."""
    precise = {r.name: r.remedy.partition(": ")[2] if r.remedy.startswith("for --backend") else r.remedy
               for r in requirements}  # fmt: skip
    fitted = []
    for status in backends:
        if not status.works and status.name == "tensorrt-rtx" and not _takes_rtx(machine):
            status = replace(status, detail=f"{status.detail}; for GeForce and RTX cards only", remedy="")
        elif not status.works and precise.get(_LACKS.get(status.name, "")):
            status = replace(status, remedy=precise[_LACKS[status.name]])
        fitted.append(status)
    return tuple(fitted)


def fitting_video(video: Sequence[VideoStatus], machine: Machine) -> tuple[VideoStatus, ...]:
    """What was found about video hardware; an encoder that this GPU does not have needs no remedy."""
    found = _NO_NVENC.search(machine.jetson or (machine.gpus[0].name if machine.gpus else ""))
    detail = f"{found[0]} has no NVENC, software encodes" if found else ""
    return tuple(
        replace(v, detail=detail, remedy="") if found and v.role == "encode" and not v.works else v
        for v in video
    )


# -- bundle -----------------------------------------------------------------------------------------


def examine_bundle(path: Path | None = None) -> BundleStatus:
    """Verify a bundle (None = the built-in one) and open each of its networks on the CPU."""
    place = "built-in" if path is None else str(path)
    try:
        bundle = open_bundle(path)
        config = BackendConfig("cpu", threads=1)
        for name in bundle.manifest.networks:
            bundle.runner(name, config).close()
        with ExitStack() as stack:
            open_family(bundle, config, stack)  # this version knows it, and it is complete
    except LpEdgeError as error:
        detail = f"{error.got}; {error.expected}" if error.expected else error.got
        return BundleStatus(place, False, detail, error.remedy or _REINSTALL)
    size = sum(entry.size for _, entry in bundle.manifest.contents())
    networks = ", ".join(bundle.manifest.networks)
    detail = f"{bundle.manifest.family} ({bundle.manifest.variant}), {size / 2**20:.1f} MiB: {networks}"
    return BundleStatus(str(bundle.directory), True, detail, "")


def examine(bundle: Path | None = None) -> Report:
    """Examine everything; takes about a second, longer where a GPU backend starts.

    Args:
        bundle: folder of the bundle to verify; None = the built-in one.
    """
    machine = examine_machine()
    requirements = examine_requirements(machine)
    return Report(
        components=examine_components(),
        machine=machine,
        backends=fitting_backends(available_backends(), machine, requirements),
        encoders=examine_encoders(),
        bundle=examine_bundle(bundle),
        requirements=requirements,
        video=fitting_video(examine_video(), machine),
    )
