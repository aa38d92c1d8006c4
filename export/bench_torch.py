"""The PyTorch side of ``lp-bench compare``: LivePortrait's own networks, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from lp_edge.engines import names
from lp_edge.errors import BackendUnavailable, ConfigError
from lp_edge.export.checkpoints import load_networks
from lp_edge.export.networks import LivePortraitNetworks
from lp_edge.runtime.bench_compare import Call, Side
from lp_edge.runtime.provenance import provenance

__all__ = ["Mode", "open_torch_side", "torch_side"]

Mode = Literal["eager", "compile"]
"""``eager``: operator by operator; ``compile``: ``torch.compile`` with ``max-autotune``, as LivePortrait calls it."""

_Network = Callable[..., Any]


def _planes(image: Tensor) -> Tensor:
    return image.permute(0, 3, 1, 2).float() / 255


def _forward(networks: LivePortraitNetworks, name: str) -> _Network:
    """A network between the tensors of the graph of that name; what depends on a portrait alone comes ready there too."""

    def appearance(image: Tensor) -> Any:
        return networks.appearance(_planes(image))

    def motion(image: Tensor) -> Any:
        return networks.motion(_planes(image))

    def warp_decode(feature: Tensor, source: Tensor, driving: Tensor) -> Any:
        image = networks.generator(networks.warping(feature, source, driving)[names.WARPED])
        return (image.float().permute(0, 2, 3, 1) * 255).clamp(0, 255).to(torch.uint8)

    forwards: dict[str, _Network] = {
        names.APPEARANCE: appearance,
        names.MOTION: motion,
        names.WARP_DECODE: warp_decode,
        names.STITCHING: networks.stitching,
        names.RETARGET_EYE: networks.retarget_eye,
        names.RETARGET_LIP: networks.retarget_lip,
    }
    return forwards[name]


_CROP = (256, 256, 3)
_INPUTS: Final[Mapping[str, tuple[tuple[int, ...], ...]]] = MappingProxyType(
    {
        names.APPEARANCE: (_CROP,),
        names.MOTION: (_CROP,),
        names.WARP_DECODE: ((32, 16, 64, 64), (21, 3), (21, 3)),
        names.STITCHING: ((126,),),
        names.RETARGET_EYE: ((66,),),
        names.RETARGET_LIP: ((65,),),
    }
)
"""Sizes of the inputs without the batch."""


def _inputs(name: str, batch: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    given = []
    for shape in _INPUTS[name]:
        if shape == _CROP:
            array = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=generator)
        else:
            scale = 0.2 if shape == (21, 3) else 1.0
            array = torch.randn((batch, *shape), generator=generator) * scale
        given.append(array.to(device))
    return given


def torch_side(
    networks: LivePortraitNetworks,
    *,
    mode: Mode = "eager",
    device: str = "cpu",
    half: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Side:
    """The networks as one side of a comparison.

    Args:
        networks: of the family; they are moved to ``device``.
        mode: how they are run.
        device: as PyTorch writes it: ``cpu``, ``cuda``, ``cuda:1``.
        half: autocast to float16, as LivePortrait runs its networks; off: float32.
        origin: provenance.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in ("eager", "compile"):
        raise ConfigError(f"mode {mode!r}", "expected eager or compile", "choose one of them")
    kind = torch.device(device).type
    for network in vars(networks).values():
        network.to(device)

    @contextmanager
    def opener(name: str, batch: int) -> Iterator[Call]:
        forward = _forward(networks, name)
        if mode == "compile":
            forward = torch.compile(forward, mode="max-autotune")
        given = _inputs(name, batch, device)

        def call() -> None:
            with torch.inference_mode(), torch.autocast(kind, torch.float16, enabled=half):
                forward(*given)
            if kind == "cuda":
                torch.cuda.synchronize(device)

        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # as LivePortrait sets it; the first calls are not counted
        try:
            yield call
        finally:
            torch.backends.cudnn.benchmark = before

    told = {"torch": torch.__version__, "device": _device_name(device), "mode": mode, "half": half}
    label = f"torch {mode}{' fp16' if half else ''}"
    return Side(label, tuple(_INPUTS), opener, {**(origin or {}), **told}, "liveportrait")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def open_torch_side(weights: Path, mode: Mode, *, device: int = 0, gpu: bool | None = None) -> Side:
    """The official networks from checkpoints: autocast to float16 on the GPU, float32 on the CPU.

    Args:
        weights: folder with the checkpoints; need not be the official ones, times do not depend on values.
        mode: how they are run.
        device: index of the GPU.
        gpu: whether on the GPU; None = where PyTorch sees one.

    Raises:
        BackendUnavailable: a GPU is asked for and PyTorch sees none.
        ExportError: as :func:`lp_edge.export.checkpoints.load_networks`.
    """
    there = torch.cuda.is_available()
    if gpu and not there:
        raise BackendUnavailable(
            f"PyTorch {torch.__version__} sees no GPU",
            "expected a build with CUDA and a driver that fits it",
            "install such a build, or compare on the CPU (--backend cpu)",
        )
    on_gpu = there if gpu is None else gpu
    networks, checkpoints = load_networks(weights, allow_unverified=True)
    return torch_side(
        networks,
        mode=mode,
        device=f"cuda:{device}" if on_gpu else "cpu",
        half=on_gpu,
        origin={**provenance(), "checkpoints": [asdict(entry) for entry in checkpoints]},
    )
