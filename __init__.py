"""lp-edge: portrait animation for edge devices, without PyTorch at run time.

>>> import lp_edge
>>> with lp_edge.Animator() as animator:                                     # doctest: +SKIP
...     for frame in animator.animate("portrait.jpg", "driver.mp4"):
...         show(frame.rgb)

or, straight into a file::

    lp_edge.animate("portrait.jpg", "driver.mp4", "result.mp4")

Importing this module is cheap: what it exports is loaded on first use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# From 1.31 on, importing onnxruntime begins to report its use to its maker, and leaves a device's id in the user's cache. An
# embedded runtime does not; ORT_DISABLE_TELEMETRY=0 brings it back.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from lp_edge.errors import (
    AccessError,
    BackendUnavailable,
    BundleError,
    ConfigError,
    DeadlineError,
    EngineError,
    ExportError,
    Interrupted,
    LimitError,
    LpEdgeError,
    MediaError,
    NoFaceError,
    NotFoundError,
    OutputError,
    ProtocolError,
    ServerUnavailable,
    TensorError,
)

if TYPE_CHECKING:
    from lp_edge.engines.backends import BackendConfig, available_backends
    from lp_edge.engines.bundle import Bundle, open_bundle
    from lp_edge.runtime.animator import AnimatedFrame, Animation, Animator
    from lp_edge.runtime.crop import CropOptions
    from lp_edge.runtime.driver import Driver, DriverFrame
    from lp_edge.runtime.edit import Edits, parse_edits
    from lp_edge.runtime.faces import Face
    from lp_edge.runtime.family import Portrait
    from lp_edge.runtime.gestures import builtin_template
    from lp_edge.runtime.hardware_video import VideoConfig
    from lp_edge.runtime.job import Progress, RunConfig, RunResult, animate, run_job
    from lp_edge.runtime.keyframes import Keyframes, load_keyframes
    from lp_edge.runtime.live import LiveAnimation
    from lp_edge.runtime.liveportrait_options import LivePortraitOptions
    from lp_edge.runtime.motion import Motion
    from lp_edge.runtime.options import AnimateOptions
    from lp_edge.runtime.stopwatch import Stopwatch
    from lp_edge.runtime.templates import MotionTemplate, load_template, save_template

    __version__: str

__all__ = [
    "AccessError",
    "AnimateOptions",
    "AnimatedFrame",
    "Animation",
    "Animator",
    "BackendConfig",
    "BackendUnavailable",
    "Bundle",
    "BundleError",
    "ConfigError",
    "CropOptions",
    "DeadlineError",
    "Driver",
    "DriverFrame",
    "Edits",
    "EngineError",
    "ExportError",
    "Face",
    "Interrupted",
    "Keyframes",
    "LimitError",
    "LiveAnimation",
    "LivePortraitOptions",
    "LpEdgeError",
    "MediaError",
    "Motion",
    "MotionTemplate",
    "NoFaceError",
    "NotFoundError",
    "OutputError",
    "Portrait",
    "Progress",
    "ProtocolError",
    "RunConfig",
    "RunResult",
    "ServerUnavailable",
    "Stopwatch",
    "TensorError",
    "VideoConfig",
    "__version__",
    "animate",
    "available_backends",
    "builtin_template",
    "load_keyframes",
    "load_template",
    "open_bundle",
    "parse_edits",
    "run_job",
    "save_template",
]

_HOMES = {
    "lp_edge.engines.backends": ("BackendConfig", "available_backends"),
    "lp_edge.engines.bundle": ("Bundle", "open_bundle"),
    "lp_edge.runtime.animator": ("AnimatedFrame", "Animation", "Animator"),
    "lp_edge.runtime.crop": ("CropOptions",),
    "lp_edge.runtime.driver": ("Driver", "DriverFrame"),
    "lp_edge.runtime.edit": ("Edits", "parse_edits"),
    "lp_edge.runtime.faces": ("Face",),
    "lp_edge.runtime.family": ("Portrait",),
    "lp_edge.runtime.gestures": ("builtin_template",),
    "lp_edge.runtime.hardware_video": ("VideoConfig",),
    "lp_edge.runtime.job": ("Progress", "RunConfig", "RunResult", "animate", "run_job"),
    "lp_edge.runtime.keyframes": ("Keyframes", "load_keyframes"),
    "lp_edge.runtime.live": ("LiveAnimation",),
    "lp_edge.runtime.liveportrait_options": ("LivePortraitOptions",),
    "lp_edge.runtime.motion": ("Motion",),
    "lp_edge.runtime.options": ("AnimateOptions",),
    "lp_edge.runtime.stopwatch": ("Stopwatch",),
    "lp_edge.runtime.templates": ("MotionTemplate", "load_template", "save_template"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load an exported name on first use (PEP 562)."""
    if name == "__version__":
        from importlib import metadata

        try:
            value: Any = metadata.version("lp-edge")
        except metadata.PackageNotFoundError:
            value = "0+unknown"  # a source tree on the path that was never installed
    elif name in _HOME_OF:
        from importlib import import_module

        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
