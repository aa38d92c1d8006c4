"""Motion of a face: head pose and expression, without pixels.

A face's keypoints are ``scale · (canonical + expression) @ rotation.T + translation`` in pixels of its frame
(x right, y down, z away from the camera). :class:`Motion` holds those parts for one frame, or for a run of frames when
the arrays carry a leading axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lp_edge.runtime.geometry import euler_from_rotation

__all__ = ["Motion"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Motion:
    """Pose and expression of one face, for one frame or for ``T`` frames (leading axis on every field).

    Attributes:
        rotation: float32 ``[..., 3, 3]``, proper rotation; acts on row points as ``p @ R.T``.
        translation: float32 ``[..., 3]``, pixels (``mesh``) or the network's unit (``liveportrait``).
        scale: float32 ``[...]``, pixels per canonical unit, > 0.
        expression: float32 ``[..., K, 3]``, canonical units, what pose does not explain (identity included).
        eye_ratio: float32 ``[..., 2]``, lid gap / eye width of the image-left and the image-right eye, ≥ 0.
        lip_ratio: float32 ``[...]``, inner lip gap / mouth width, ≥ 0.
    """

    rotation: F32
    translation: F32
    scale: F32
    expression: F32
    eye_ratio: F32
    lip_ratio: F32

    @property
    def angles(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """``(pitch, yaw, roll)`` in degrees, see :mod:`lp_edge.runtime.geometry`."""
        return euler_from_rotation(self.rotation)

    def __len__(self) -> int:
        """Number of frames ``T``; a single frame has no length (TypeError)."""
        if self.scale.ndim == 0:
            raise TypeError("a Motion of one frame has no len()")
        return int(self.scale.shape[0])

    def __getitem__(self, index: int | slice) -> Motion:
        """The frame or the frames at ``index``; only for a Motion of ``T`` frames."""
        len(self)
        return Motion(
            self.rotation[index],
            self.translation[index],
            self.scale[index],
            self.expression[index],
            self.eye_ratio[index],
            self.lip_ratio[index],
        )

    @staticmethod
    def stack(motions: list[Motion]) -> Motion:
        """Frames → one Motion with a leading time axis. Raises ValueError when ``motions`` is empty."""

        def field(name: str) -> F32:
            return np.stack([np.asarray(getattr(m, name), np.float32) for m in motions])

        return Motion(
            field("rotation"),
            field("translation"),
            field("scale"),
            field("expression"),
            field("eye_ratio"),
            field("lip_ratio"),
        )
