"""What the animator asks of a family of networks; one adapter per family fills it in.

A family prepares source faces, reads motion from driving frames, puts the two together and draws. Everything about
streams, files and threads is the animator's business, everything about networks is the family's::

    source frame ── prepare ──> Portrait ─┐
                                          ├─ Follower.keypoints ── render ── Place.draw
    driving frame ─ read, motion ─ Motion ┘

Pixels are a :data:`~lp_edge.engines.runner.Array`: on the host, or on the device where the networks run
(:mod:`lp_edge.runtime.pixels`); adapters do not ask where.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from lp_edge.engines.runner import Array
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.pixels import Place
from lp_edge.runtime.templates import MotionTemplate

__all__ = ["DriverKind", "Family", "Follower", "Portrait"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

DriverKind = Literal["video", "image", "edit"]
"""What drives: frames over time (clip, template), a single picture, or nothing but edits."""


@dataclass(frozen=True)
class Portrait:
    """A face of a source frame, prepared for rendering; families add what they need.

    Attributes:
        frame: uint8 ``[H, W, 3]`` RGB, the whole source frame.
        motion: the source face's own motion.
        place: where its animated crops go.
    """

    frame: U8
    motion: Motion
    place: Place


P = TypeVar("P", bound=Portrait)


class Follower(ABC, Generic[P]):
    """Turns a driver's motion into keypoints for ONE face of the source, frame after frame and in order."""

    def plan(self, sources: Sequence[Motion], driving: Sequence[Motion], neutral: Motion) -> None:
        """Look at the whole of a source clip's and a driver's motion before the first frame, where a family wants to."""

    @abstractmethod
    def keypoints(
        self, index: int, portrait: P, driving: Motion, neutral: Motion, edits: Edits
    ) -> tuple[F32, F32]:
        """Source and driving keypoints float32 ``[K, 3]`` of one frame.

        Args:
            index: number of the frame in the result; grows from call to call, may leave out frames without a face.
            portrait: the face as it is in this frame of the source.
            driving: what the driver does in this frame.
            neutral: the driver's motion that stands for "no motion".
            edits: changes on top; ``Edits()`` for none.
        """


class Family(ABC, Generic[P]):
    """Adapter of one family of networks; draws several frames at once, and does all else for one face of one frame.

    Attributes:
        name: as in the manifest of its bundles.
        backend: backend that runs the networks that draw.
        resident: frames stay on a device from the networks to the finished picture.
        accelerated: the network that draws leaves its results on a GPU. Pixels may be ``resident`` without: their graphs run on a
            CPU backend as well.
        max_batch: most frames that :meth:`render` takes at once; None = no bound but memory.
        mixes_portraits: :meth:`render` takes frames of different portraits together, and that pays.
    """

    name: str
    backend: str
    resident: bool
    accelerated: bool
    max_batch: int | None
    mixes_portraits: bool

    # -- sources ---------------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, frame: U8, points: F32, options: AnimateOptions, *, clip: bool) -> Any:
        """What is known of a source face without its pixels; small, so that a whole clip's may be kept.

        Args:
            frame: uint8 ``[H, W, 3]``.
            points: float32 ``[478, 3]``, mesh in frame pixels.
            options: how crops are cut.
            clip: the frame belongs to a clip.
        """

    @abstractmethod
    def motion_of_measure(self, measure: Any) -> Motion:
        """The source face's own motion."""

    @abstractmethod
    def portrait(self, frame: U8, measure: Any, options: AnimateOptions, *, clip: bool) -> P:
        """A measured face made ready to render; arguments as of :meth:`measure`."""

    def prepare(self, frame: U8, points: F32, options: AnimateOptions) -> P:
        """:meth:`measure` and :meth:`portrait` of a picture's face."""
        return self.portrait(frame, self.measure(frame, points, options, clip=False), options, clip=False)

    def measures_whole_clip(self, kind: DriverKind) -> bool:
        """Whether a source clip is measured as a whole before its first frame is drawn (its decoding is repeated)."""
        return False

    # -- drivers ---------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, rgb: U8, points: F32, options: AnimateOptions) -> Any:
        """What is read from a driving face before the crop is known; small, so that a whole clip's may be kept."""

    @abstractmethod
    def motion(self, rgb: U8, reading: Any, box: F32 | None, options: AnimateOptions) -> Motion:
        """Motion of a driving face; ``box`` is :meth:`common_box`'s, None where the whole frame is the crop."""

    def needs_common_box(self, size: tuple[int, int], options: AnimateOptions) -> bool:
        """Whether a driving clip of ``(width, height)`` is cut with one box for all its frames."""
        return False

    def common_box(self, readings: Sequence[Any]) -> F32 | None:
        """That box, float32 ``[4]`` x0, y0, x1, y1 in frame pixels."""
        return None

    @abstractmethod
    def picture_neutral(self, motion: Motion) -> Motion:
        """What "no motion" means for a driver that is a single picture."""

    @abstractmethod
    def load_template(self, path: str | Path) -> MotionTemplate:
        """A template file, or the built-in one of that name, as motion of this family."""

    # -- rendering -------------------------------------------------------------------------------------

    @abstractmethod
    def follower(self, options: AnimateOptions, kind: DriverKind, *, source_clip: bool) -> Follower[P]:
        """A follower for one face.

        Raises:
            ConfigError: an option does not go with this family or this kind of driver.
        """

    @abstractmethod
    def render(self, portraits: Sequence[P], kp_source: Sequence[F32], kp_driving: Sequence[F32]) -> Array:
        """Animated crops of N frames.

        Args:
            portraits: the face of each frame; all the same object unless :attr:`mixes_portraits`.
            kp_source, kp_driving: keypoints of each frame, as a follower gives them.

        Returns:
            uint8 ``[N, h, w, 3]``, perhaps still being computed.
        """

    @abstractmethod
    def crop_size(self, options: AnimateOptions) -> int:
        """Side in pixels of the square result where nothing is pasted back."""

    @abstractmethod
    def crops_alone(self, portrait: P, crops: Array, options: AnimateOptions) -> list[Callable[[], U8]]:
        """Those results for N crops of one portrait: functions that wait for one each, and return uint8 ``[S, S, 3]``."""

    @abstractmethod
    def still_crop(self, portrait: P) -> Array:
        """The source's own pixels as one crop uint8 ``[1, h, w, 3]``, as :meth:`render` would draw it without any motion."""
