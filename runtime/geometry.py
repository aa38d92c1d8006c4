"""Rotations and rigid alignment, in plain NumPy.

Conventions: points are rows, x right, y down, z away from the camera (smaller = nearer), so a rotation
acts as ``p @ R.T``. Angles are degrees: *pitch* > 0 looks down, *yaw* > 0 turns the nose towards the right of
the picture, *roll* > 0 tilts the head clockwise as seen in the picture.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["euler_from_rotation", "orthonormal", "rotation_from_euler", "similarity_fit"]

F64 = npt.NDArray[np.float64]


def rotation_from_euler(pitch: npt.ArrayLike, yaw: npt.ArrayLike, roll: npt.ArrayLike) -> F64:
    """Rotation matrices from head angles, ``R = Rz(roll) · Ry(-yaw) · Rx(pitch)``.

    Args:
        pitch, yaw, roll: degrees, scalars or arrays of one shape ``[...]``.

    Returns:
        float64 ``[..., 3, 3]``.

    Example:
        >>> nose = np.array([0.0, 0.0, -1.0])
        >>> bool((rotation_from_euler(0, 30, 0) @ nose)[0] > 0)   # yaw > 0: nose to the right
        True
    """
    x, y, z = (np.deg2rad(np.asarray(a, dtype=np.float64)) for a in (pitch, yaw, roll))
    x, y, z = np.broadcast_arrays(x, -y, z)
    one, zero = np.ones_like(x), np.zeros_like(x)
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)

    def matrix(*rows: F64) -> F64:
        return np.stack(rows, axis=-1).reshape(*x.shape, 3, 3)

    rx = matrix(one, zero, zero, zero, cx, -sx, zero, sx, cx)
    ry = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    rz = matrix(cz, -sz, zero, sz, cz, zero, zero, zero, one)
    return rz @ ry @ rx


def euler_from_rotation(rotation: npt.ArrayLike) -> tuple[F64, F64, F64]:
    """Head angles of rotation matrices; the inverse of :func:`rotation_from_euler` for \\|yaw\\| < 90°.

    Args:
        rotation: ``[..., 3, 3]``.

    Returns:
        ``(pitch, yaw, roll)`` in degrees, float64 ``[...]``.
    """
    r = np.asarray(rotation, dtype=np.float64)
    pitch = np.arctan2(r[..., 2, 1], r[..., 2, 2])
    yaw = -np.arcsin(np.clip(-r[..., 2, 0], -1.0, 1.0))
    roll = np.arctan2(r[..., 1, 0], r[..., 0, 0])
    return np.rad2deg(pitch), np.rad2deg(yaw), np.rad2deg(roll)


def orthonormal(matrix: npt.ArrayLike) -> F64:
    """The rotation nearest to ``matrix`` ``[..., 3, 3]`` in the Frobenius norm (det = +1)."""
    u, _, vt = np.linalg.svd(np.asarray(matrix, dtype=np.float64))
    sign = np.sign(np.linalg.det(u @ vt))
    u[..., :, 2] *= sign[..., None]
    return np.asarray(u @ vt)


def similarity_fit(
    model: npt.ArrayLike, target: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> tuple[F64, F64, F64]:
    """Least-squares similarity ``target ≈ scale · model @ R.T + t`` (Umeyama 1991, eq. 40-42).

    Args:
        model: ``[K, D]`` points, D = 2 or 3.
        target: ``[..., K, D]`` points.
        weights: ``[K]`` non-negative; ``None`` weighs all alike.

    Returns:
        ``(R [..., D, D], t [..., D], scale [...])``, float64; ``R`` is a proper rotation.
    """
    a, b = np.asarray(model, np.float64), np.asarray(target, np.float64)
    w = np.ones(a.shape[-2]) if weights is None else np.asarray(weights, np.float64)
    w = (w / w.sum())[:, None]
    mean_a, mean_b = (w * a).sum(-2), (w * b).sum(-2)
    a0, b0 = a - mean_a, b - mean_b[..., None, :]
    cov = np.swapaxes(b0, -1, -2) @ (w * a0)
    u, d, vt = np.linalg.svd(cov)
    sign = np.ones_like(d)
    sign[..., -1] = np.sign(np.linalg.det(u @ vt))
    rotation = (u * sign[..., None, :]) @ vt
    scale = (d * sign).sum(-1) / (w * a0**2).sum()
    t = mean_b - scale[..., None] * (rotation @ mean_a)
    return rotation, t, scale
