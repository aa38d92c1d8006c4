"""Motion read from mesh points, and mesh points made from motion.

A face is ``scale · (canonical + expression) @ rotation.T + translation``. Pose is the weighted similarity (Umeyama
1991) that maps the canonical face's rigid points (nose bridge, forehead, temples, eye corners) onto the observed ones;
expression is what that leaves over, in canonical units, so it holds the shape of the face (identity) as well.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lp_edge.errors import BundleError, TensorError
from lp_edge.runtime import topology
from lp_edge.runtime.geometry import similarity_fit
from lp_edge.runtime.motion import Motion

__all__ = ["Canonical", "load_canonical", "motion_from_points", "points_from_motion"]

F32 = npt.NDArray[np.float32]

_POINTS = 478


@dataclass(frozen=True)
class Canonical:
    """The canonical face: neutral (lips closed, eyes open), frontal, mirror-symmetric.

    Unit: the distance of the iris centres 468 and 473 is 1. x right in the picture, y down, z away from the camera. The
    origin is the centre about which a head turns: mid-plane, level with the eye corners, 0.9 units behind them.

    Attributes:
        points: float32 ``[478, 3]``.
        basis: float32 ``[K, 478, 3]``, directions of expression, orthonormal over the 1434 coordinates,
            strongest first.
        basis_std: float32 ``[K]``, standard deviation of each coefficient over the training clips.
        rigid: intp ``[P]``, points that expression hardly moves.
        rigid_weight: float32 ``[P]``, their weights in the pose fit.
    """

    points: F32
    basis: F32
    basis_std: F32
    rigid: npt.NDArray[np.intp]
    rigid_weight: F32

    @staticmethod
    def from_table(table: Mapping[str, npt.NDArray[np.generic]]) -> Canonical:
        """Build from the arrays of ``canonical.npz``.

        Raises:
            BundleError: an array is missing, has a wrong shape or holds NaN.
        """
        remedy = "rebuild it: python -m lp_edge.export.mesh.canonical"
        arrays: dict[str, npt.NDArray[np.float32]] = {}
        for name in ("points", "basis", "basis_std", "rigid", "rigid_weight"):
            if name not in table:
                raise BundleError(f"the canonical face has no array {name!r}", f"got {sorted(table)}", remedy)
            arrays[name] = np.asarray(table[name]).astype(np.float32)
            if not np.isfinite(arrays[name]).all():
                raise BundleError(f"array {name!r} of the canonical face holds NaN", "finite numbers", remedy)
        rigid = arrays["rigid"].astype(np.intp)
        k = arrays["basis_std"].shape[0] if arrays["basis_std"].ndim == 1 else -1
        expected = {"points": (_POINTS, 3), "basis": (k, _POINTS, 3), "rigid_weight": rigid.shape}
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                raise BundleError(
                    f"array {name!r} of the canonical face is {arrays[name].shape}",
                    f"expected {shape}",
                    remedy,
                )
        if rigid.ndim != 1 or len(rigid) < 4 or rigid.min() < 0 or rigid.max() >= _POINTS:
            raise BundleError(
                "'rigid' of the canonical face is no list of points", "indices 0 to 477", remedy
            )
        return Canonical(
            arrays["points"], arrays["basis"], arrays["basis_std"], rigid, arrays["rigid_weight"]
        )


def load_canonical(path: Path | None = None) -> Canonical:
    """Read ``canonical.npz``; ``None`` reads the one that ships with the package.

    Raises:
        BundleError: the file is missing or broken.
    """
    path = path or Path(__file__).resolve().parent.parent / "engines" / "data" / "mesh" / "canonical.npz"
    try:
        # np.load would leave a file that it opened itself open when it is no zip file
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as table:
            return Canonical.from_table({name: table[name] for name in table.files})
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"cannot read {path}: {error}", "a canonical face", "reinstall lp-edge") from error


def motion_from_points(points: npt.ArrayLike, canonical: Canonical) -> Motion:
    """Motion of one face, or of a run of faces, from mesh points.

    Args:
        points: ``[..., 478, 3]``, x and y in pixels of the frame, z in the same unit.
        canonical: the canonical face.

    Returns:
        Motion whose fields carry the leading axes of ``points``; rotation turns the canonical face into the
        observed one, translation is the head's rotation centre in pixels, scale is pixels per inter-ocular
        distance, expression is ``[..., 478, 3]``.

    Raises:
        TensorError: wrong shape, NaN, or points that coincide.

    Example:
        >>> face = load_canonical()
        >>> motion = motion_from_points(face.points * 100.0, face)
        >>> round(float(motion.scale), 3), bool(abs(motion.expression).max() < 1e-4)
        (100.0, True)
    """
    p = np.asarray(points, np.float64)
    if p.shape[-2:] != (_POINTS, 3):
        raise TensorError(
            f"mesh points are {p.shape}", "expected [..., 478, 3]", "pass the output of the face mesh"
        )
    if not np.isfinite(p).all():
        raise TensorError("mesh points hold NaN or infinity", "finite pixels", "drop the frame")
    base = canonical.points.astype(np.float64)
    rotation, translation, scale = similarity_fit(
        base[canonical.rigid], p[..., canonical.rigid, :], canonical.rigid_weight
    )
    if not (scale > 0.0).all():
        raise TensorError("mesh points coincide", "a face with some extent", "drop the frame")
    aligned = (p - translation[..., None, :]) @ rotation / scale[..., None, None]
    return Motion(
        rotation=rotation.astype(np.float32),
        translation=translation.astype(np.float32),
        scale=scale.astype(np.float32),
        expression=(aligned - base).astype(np.float32),
        eye_ratio=np.asarray(topology.eye_ratio(p), np.float32),
        lip_ratio=np.asarray(topology.lip_ratio(p), np.float32),
    )


def points_from_motion(motion: Motion, canonical: Canonical) -> F32:
    """Mesh points float32 ``[..., 478, 3]`` in pixels; the inverse of :func:`motion_from_points`.

    Only pose and expression are used: the ratios follow from them.

    Raises:
        TensorError: the motion's expression is not that of 478 mesh points (say, a LivePortrait template's).
    """
    expression = np.asarray(motion.expression, np.float64)
    if expression.shape[-2:] != (_POINTS, 3):
        raise TensorError(
            f"the expression is {expression.shape}",
            "expected [..., 478, 3]",
            "convert LivePortrait templates with lp_edge.runtime.liveportrait_template.to_mesh",
        )
    rotation = np.asarray(motion.rotation, np.float64)
    scale = np.asarray(motion.scale, np.float64)[..., None, None]
    shape = canonical.points + expression
    out = scale * (shape @ np.swapaxes(rotation, -1, -2)) + np.asarray(motion.translation)[..., None, :]
    return np.asarray(out, np.float32)
