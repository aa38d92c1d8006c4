"""Clients of the gRPC server ``lp-serve``: :class:`Client` for threads, :class:`lp_edge.client.aio.Client` for asyncio.

>>> from lp_edge.client import Client
>>> with Client("127.0.0.1:50051") as client:                                     # doctest: +SKIP
...     portrait = client.register("portrait.jpg")
...     with client.animate(portrait, mode="live") as stream:
...         for frame in stream.drive(camera):
...             show(frame.rgb)

Importing this package is cheap: what it exports is loaded on first use. Needs gRPC: ``pip install 'lp-edge[client]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lp_edge.client.sync import AnimateStream, Client, RenderedFrames
    from lp_edge.client.types import (
        Device,
        Edit,
        ExtractedMotion,
        Face,
        Frame,
        Limits,
        Load,
        MotionInfo,
        Network,
        Output,
        Picture,
        Portrait,
        Progress,
        RenderedClip,
        ServerInfo,
        Stage,
        Timings,
        TlsFiles,
    )
    from lp_edge.runtime.motion import Motion

__all__ = [
    "AnimateStream",
    "Client",
    "Device",
    "Edit",
    "ExtractedMotion",
    "Face",
    "Frame",
    "Limits",
    "Load",
    "Motion",
    "MotionInfo",
    "Network",
    "Output",
    "Picture",
    "Portrait",
    "Progress",
    "RenderedClip",
    "RenderedFrames",
    "ServerInfo",
    "Stage",
    "Timings",
    "TlsFiles",
]

_SYNC = ("AnimateStream", "Client", "RenderedFrames")


def __getattr__(name: str) -> Any:
    """Load an exported name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = "client.sync" if name in _SYNC else "runtime.motion" if name == "Motion" else "client.types"
    value = getattr(import_module(f"lp_edge.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
