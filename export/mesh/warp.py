"""The ``warp_decode`` graph of the ``mesh`` family: closed-form dense motion, warp and mouth interior.

One graph turns a source crop and two sets of keypoints into the animated crop. As W in LivePortrait
combines sparse motions with a mask, every keypoint proposes a displacement and Gaussian weights combine them;
here the weights have a closed form. All coordinates are pixels of the crop, x right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from lp_edge.runtime import topology

__all__ = ["MeshWarp", "WarpConfig"]


@dataclass(frozen=True)
class WarpConfig:
    """Constants that are frozen into the graph. Lengths are fractions of the face size (see ``MeshWarp``).

    Attributes:
        grid: cells per side of the coarse grid on which the displacement is computed.
        detail_grid: cells per side of the grid on which mouth and eyes are composed.
        sigma_min, sigma_max: bounds of the kernels' standard deviation; within them a kernel is as
            wide as the spacing of the mesh at its point.
        corrections: how often the residual at the keypoints is fed back into the field.
        head_weight, head_sigma: weight and extent (x, up, down) of the kernel that carries hair and head.
        background: constant weight that holds what is far from the face.
        border: part of the crop's side over which all motion fades to zero at the crop's border.
        min_jacobian: smallest determinant of the warp's Jacobian that is let through.
    """

    grid: int = 128
    detail_grid: int = 192
    sigma_min: float = 0.016
    sigma_max: float = 0.055
    corrections: int = 6
    head_weight: float = 0.25
    head_sigma: tuple[float, float, float] = (0.52, 0.62, 0.42)
    background: float = 0.02
    border: float = 0.10
    min_jacobian: float = 0.02


_MOUTH_CORNERS = (topology.INNER_LIP_UPPER[0], topology.INNER_LIP_UPPER[-1])
_EYE_CORNERS = (topology.LEFT_EYE_CORNERS, topology.RIGHT_EYE_CORNERS)
_IRIS_CENTRES = (topology.LEFT_IRIS[0], topology.RIGHT_IRIS[0])
# Per eye, from image left to image right: upper rim, lower rim, skin below the brow, crease below.
_EYE_ROWS = (
    ((33, 161, 159, 157, 133), (33, 163, 145, 154, 133), (130, 225, 223, 221, 243), (130, 110, 23, 26, 243)),
    (
        (362, 384, 386, 388, 263),
        (362, 381, 374, 390, 263),
        (463, 441, 443, 445, 359),
        (463, 256, 253, 339, 359),
    ),
)


def _soft_step(x: Tensor) -> Tensor:
    """Cubic ramp, 0 below 0 and 1 above 1."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


class MeshWarp(nn.Module):
    """Warp of a source crop by mesh keypoints; see the module text for the idea.

    ``forward`` takes ``image`` uint8 ``[S, H, W, 3]`` RGB (S = 1 or N), ``kp_source`` and ``kp_driving``
    float32 ``[N, 478, 3]`` in crop pixels (z is used to let nearer points win), and returns ``image`` uint8 ``[N, H, W, 3]``
    and ``deformation`` float32 ``[N, grid, grid, 2]``: where each cell centre of the animated crop is sampled in the source crop,
    in crop pixels. The face size is the larger of the mesh's extents along x and y.
    """

    sigma: Tensor
    weight: Tensor

    def __init__(self, canonical: np.ndarray, config: WarpConfig | None = None) -> None:
        """``canonical``: float ``[478, 3]``, the neutral mesh in any unit; fixes kernel widths only."""
        super().__init__()
        self.config = config or WarpConfig()
        xy = np.asarray(canonical, np.float64)[:, :2]
        size = float(np.ptp(xy, axis=0).max())
        distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) / size
        spacing = np.sort(distance, axis=1)[:, 1:7].mean(axis=1)
        sigma = np.clip(0.75 * spacing, self.config.sigma_min, self.config.sigma_max)
        # A dense patch must not outvote a sparse one: weigh by the area that a point stands for.
        density = np.exp(-(distance**2) / (2 * 0.03**2)).sum(axis=1)
        vote = 1.0 / np.sqrt(density)
        # The eyeball moves behind the lids; `_eye` places it.
        vote[[*topology.LEFT_IRIS, *topology.RIGHT_IRIS]] = 0.0
        self.canonical = np.asarray(canonical, np.float32)
        self.register_buffer("sigma", torch.tensor(sigma, dtype=torch.float32))
        self.register_buffer("weight", torch.tensor(vote, dtype=torch.float32))
        # Oriented area of a ring of neighbours tells whether a patch faces the camera. Lids and lips close
        # without turning away, so they are always trusted.
        ring = np.argsort(distance, axis=1)[:, 1:9]
        around = xy[ring] - xy[:, None]
        order = np.argsort(np.arctan2(around[..., 1], around[..., 0]), axis=1)
        self.register_buffer("ring", torch.tensor(np.take_along_axis(ring, order, 1)))
        always = np.zeros(len(xy), np.float32)
        always[sorted({*topology.REGIONS["eyes"], *topology.REGIONS["lip"]})] = 1.0
        self.register_buffer("always", torch.tensor(always))
        rigid = np.zeros(len(xy), np.float32)
        rigid[list(topology.RIGID)] = 1.0 / len(topology.RIGID)
        self.register_buffer("rigid", torch.tensor(rigid))
        self.register_buffer("lip_rows", torch.tensor((topology.INNER_LIP_UPPER, topology.INNER_LIP_LOWER)))
        self.register_buffer("eye_rows", torch.tensor(_EYE_ROWS))
        self.register_buffer("lips", torch.tensor(topology.OUTER_LIP_UPPER + topology.OUTER_LIP_LOWER))

    # -- dense motion ---------------------------------------------------------------------------

    def _facing(self, s: Tensor, d: Tensor) -> Tensor:
        """Share of trust ``[N, 478]`` in points that still face the camera in the driving mesh."""

        def area(p: Tensor) -> Tensor:
            ring = p[:, self.ring] - p[:, :, None]
            following = torch.cat((ring[:, :, 1:], ring[:, :, :1]), 2)
            return (ring[..., 0] * following[..., 1] - ring[..., 1] * following[..., 0]).sum(-1)

        ratio = area(d) / area(s).abs().clamp_min(1.0)
        return torch.maximum(_soft_step((ratio - 0.05) / 0.3), self.always)

    def _axis(self, cells: int, length: Tensor) -> Tensor:
        """Cell centres in pixels along one side, ``[cells]``."""
        return (torch.arange(cells, dtype=torch.float32) + 0.5) * (length / cells) - 0.5

    def _head_field(
        self, kp_s: Tensor, kp_d: Tensor, x: Tensor, y: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and displacement (x, y) of the head's similarity at points ``x, y``, all ``[N, ...]``.

        The similarity is the least-squares one from the driving to the source points (rigid ones only).
        """
        r = self.rigid[None, :, None]
        centre_s, centre_d = (kp_s * r).sum(1, keepdim=True), (kp_d * r).sum(1, keepdim=True)
        p, q = kp_d - centre_d, kp_s - centre_s
        norm = (r * p * p).sum((1, 2)).clamp_min(1e-6)
        a = (r * p * q).sum((1, 2)) / norm
        b = (r[..., 0] * (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0])).sum(1) / norm
        view = (-1,) + (1,) * (x.dim() - 1)
        a, b, size = a.view(view), b.view(view), size.view(view)
        cs, cd = centre_s[:, 0], centre_d[:, 0]
        px, py = x - cd[:, 0].view(view), y - cd[:, 1].view(view)
        dx = cs[:, 0].view(view) + a * px - b * py - x
        dy = cs[:, 1].view(view) + b * px + a * py - y
        sx, up, down = self.config.head_sigma
        sy = torch.where(py < 0, up * size, down * size)
        weight = self.config.head_weight * torch.exp(-0.5 * ((px / (sx * size)) ** 2 + (py / sy) ** 2))
        return weight, dx, dy

    def _displacement(self, kp_s: Tensor, kp_d: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Backward displacement ``[N, 2, grid, grid]`` in pixels."""
        c = self.config
        extent = kp_d.amax(1) - kp_d.amin(1)
        size = torch.maximum(extent[:, 0], extent[:, 1]).clamp_min(1.0)
        extent_z = kp_d[..., 2] - kp_d[..., 2].mean(1, keepdim=True)
        s, d = kp_s[..., :2], kp_d[..., :2]
        target = s - d
        sigma = self.sigma[None] * size[:, None]
        k = 0.5 / (sigma * sigma)
        weight = self.weight[None] * torch.exp(-1.5 * extent_z / size[:, None]) * self._facing(s, d)

        # Field at the keypoints themselves, then feed back what the smoothing lost.
        local = d - d.mean(1, keepdim=True)  # centred: squares of large coordinates would cost precision
        square = (local * local).sum(-1)
        distance = square[:, :, None] + square[:, None] - 2 * (local @ local.transpose(1, 2))
        at_points = torch.exp(-distance.clamp_min(0) * k[:, None]) * weight[:, None]
        head_w, head_x, head_y = self._head_field(s, d, d[..., 0], d[..., 1], size)
        head = torch.stack((head_x, head_y), -1) * head_w[..., None]
        norm = 1.0 / (at_points.sum(-1) + head_w + c.background)
        coefficient = target
        for _ in range(c.corrections):
            coefficient = coefficient + target - (at_points @ coefficient + head) * norm[..., None]

        gx, gy = self._axis(c.grid, width), self._axis(c.grid, height)
        ex = torch.exp(-((gx[None, None] - d[..., :1]) ** 2) * k[..., None])
        ey = torch.exp(-((gy[None, None] - d[..., 1:]) ** 2) * k[..., None]) * weight[..., None]
        ey = ey.transpose(1, 2)
        rows = torch.cat((ey, ey * coefficient[:, None, :, 0], ey * coefficient[:, None, :, 1]), 1)
        total, num_x, num_y = (rows @ ex).split(c.grid, 1)
        x, y = gx[None, None], gy[None, :, None]
        x, y = x.expand(1, c.grid, c.grid), y.expand(1, c.grid, c.grid)
        head_w, head_x, head_y = self._head_field(s, d, x, y, size)
        norm = 1.0 / (total + head_w + c.background)
        field = torch.stack(((num_x + head_w * head_x) * norm, (num_y + head_w * head_y) * norm), 1)

        return field * self._window()

    def _window(self) -> Tensor:
        """What is left of any motion, ``[grid, grid]``: all of it inside, nothing at the crop's border."""
        edge = (torch.arange(self.config.grid, dtype=torch.float32) + 0.5) / self.config.grid
        window = _soft_step((torch.minimum(edge, 1 - edge) - 0.5 / self.config.grid) / self.config.border)
        return window[None, :] * window[:, None]

    def _corner_terms(self, field: Tensor, cell_x: Tensor, cell_y: Tensor) -> tuple[Tensor, Tensor]:
        """Trace and determinant of the displacement's gradient at the four corners of every cell, ``[N, 4, G-1, G-1]``."""
        a, b = field[:, :, :-1, :-1], field[:, :, :-1, 1:]
        c, e = field[:, :, 1:, :-1], field[:, :, 1:, 1:]
        top, bottom, left, right = (b - a) / cell_x, (e - c) / cell_x, (c - a) / cell_y, (e - b) / cell_y
        along_x = torch.stack((top, top, bottom, bottom), 2)
        along_y = torch.stack((left, right, left, right), 2)
        trace = along_x[:, 0] + along_y[:, 1]
        det = along_x[:, 0] * along_y[:, 1] - along_x[:, 1] * along_y[:, 0]
        return trace, det

    def _unfold(self, field: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Make the warp one-to-one: smooth the field where it folds, then shrink what still folds.

        A bilinear cell is one-to-one when the Jacobian is positive at its four corners. det(I + sJ) = 1 + s·tr J + s²·det J
        gives the largest safe factor s in closed form.
        """
        c = self.config
        cell_x, cell_y, window = width / c.grid, height / c.grid, self._window()
        for radius in (2, 4, 8, 12):
            trace, det = self._corner_terms(field, cell_x, cell_y)
            folded = ((1 + trace + det).amin(1, keepdim=True) < c.min_jacobian).to(field.dtype)
            folded = F.pad(folded, (0, 1, 0, 1))
            mask = F.max_pool2d(folded, 2 * radius + 1, 1, radius)
            mask = F.avg_pool2d(mask, 2 * radius + 1, 1, radius) * window
            blurred = F.avg_pool2d(field, 2 * radius + 1, 1, radius)
            field = field + mask * (blurred - field)
        trace, det = self._corner_terms(field, cell_x, cell_y)
        slack = 1 - c.min_jacobian
        # smallest positive root of slack + s·trace + s²·det, written so that det -> 0 is harmless
        root = torch.sqrt((trace * trace - 4 * slack * det).clamp_min(0.0))
        complex_pair = (trace * trace - 4 * slack * det) < 0
        denominator = root - trace
        limit = torch.where(
            complex_pair | (denominator <= 1e-6),
            torch.full_like(root, 4.0),
            2 * slack / denominator.clamp_min(1e-6),
        )
        shrink = limit.amin((1, 2, 3), keepdim=True).clamp(0.0, 1.0)
        return field * shrink

    # -- mouth and eyes -------------------------------------------------------------------------------
    #
    # Lips and lids slide over what lies behind them, which no smooth warp can do. Inside them the sampling
    # position is therefore set by curves: a frame runs from corner to corner (u = 0..1, v downwards, both in
    # widths of the feature), and lips, lids and creases are piecewise-linear curves v(u) through mesh points.

    @staticmethod
    def _frame(kp: Tensor, corners: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Start ``[N, 2]``, unit axis ``[N, 2]`` and width ``[N, 1]`` of a feature."""
        start, end = kp[:, corners[0]], kp[:, corners[1]]
        width = torch.sqrt(((end - start) ** 2).sum(-1, keepdim=True)).clamp_min(1.0)
        return start, (end - start) / width, width

    @staticmethod
    def _to_frame(frame: tuple[Tensor, Tensor, Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates u, v ``[N, P]`` of ``points [N, P, 2]``."""
        start, axis, width = frame
        p = (points - start[:, None]) / width[:, None]
        ax, ay = axis[:, None, 0], axis[:, None, 1]
        return p[..., 0] * ax + p[..., 1] * ay, p[..., 1] * ax - p[..., 0] * ay

    @staticmethod
    def _pixels_to_frame(frame: tuple[Tensor, Tensor, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates u, v ``[N, G, G]`` of the positions ``x [1, 1, G]``, ``y [1, G, 1]``."""
        start, axis, width = (t[..., None, None] for t in frame)
        ax, ay = axis[:, 0] / width[:, 0], axis[:, 1] / width[:, 0]
        px, py = x - start[:, 0], y - start[:, 1]  # a row and a column: only the last sum is [N, G, G]
        return px * ax + py * ay, py * ax - px * ay

    @staticmethod
    def _from_frame(frame: tuple[Tensor, Tensor, Tensor], u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels x, y of frame coordinates ``u, v [N, G, G]``."""
        start, axis, width = (t[..., None, None] for t in frame)
        ax, ay = axis[:, 0] * width[:, 0], axis[:, 1] * width[:, 0]
        return start[:, 0] + u * ax - v * ay, start[:, 1] + u * ay + v * ax

    def _nodes(self, frame: tuple[Tensor, Tensor, Tensor], kp: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Curves through ``rows [R, P]`` of mesh points: common u ``[N, P]``, strictly increasing from 0 to 1, and v ``[N, R, P]``.

        The first two rows (the rims) share their end points, the feature's corners, and set u.
        """
        count = rows.shape[1]
        u, v = self._to_frame(frame, kp[:, rows.flatten()])
        u = 0.5 * (u[:, :count] + u[:, count : 2 * count])
        step = (u[:, 1:] - u[:, :-1]).clamp_min(0.02)
        # a cumulative sum as a product, since not every target knows CumSum
        u = torch.cat((torch.zeros_like(u[:, :1]), step @ torch.ones(count - 1, count - 1).triu()), 1)
        return u / u[:, -1:], v.reshape(-1, rows.shape[0], count)

    @staticmethod
    def _curves(u_nodes: Tensor, v_nodes: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """Curves ``v_nodes [N, C, P]`` over ``u_nodes [N, P]``, evaluated at ``u [N, G, G]``; C times ``[N, G, G]``.

        Written as sums of ramps: one MatMul, no gather.
        """
        slope = (v_nodes[:, :, 1:] - v_nodes[:, :, :-1]) / (u_nodes[:, None, 1:] - u_nodes[:, None, :-1])
        bend = torch.cat((slope[:, :, :1], slope[:, :, 1:] - slope[:, :, :-1]), 2)
        ramps = F.relu(u[:, None] - u_nodes[:, :-1, None, None])
        side = u.shape[-1]
        value = (bend @ ramps.flatten(2)).reshape(-1, v_nodes.shape[1], side, side)
        return (value + v_nodes[:, :, :1, None]).unbind(1)

    def _mouth_curves(self, kp_s: Tensor, kp_d: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The inner lips in the mouth's frame, at positions ``x [1, 1, G]``, ``y [1, G, 1]``.

        Returns:
            v of the position, u of the position, upper and lower lip in the driving mesh, the same in the source
            mesh, and the source's u; each ``[N, G, G]``. Crossed lips (noise) count as closed.
        """
        frame, frame_s = self._frame(kp_d, _MOUTH_CORNERS), self._frame(kp_s, _MOUTH_CORNERS)
        u_nodes, v_nodes = self._nodes(frame, kp_d, self.lip_rows)
        u_nodes_s, v_nodes_s = self._nodes(frame_s, kp_s, self.lip_rows)
        u, v = self._pixels_to_frame(frame, x, y)
        top, low, top_s, low_s, u_s = self._curves(
            u_nodes, torch.cat((v_nodes, v_nodes_s, u_nodes_s[:, None]), 1), u
        )
        return v, u, top, torch.maximum(top, low), top_s, torch.maximum(top_s, low_s), u_s

    def _open_mouth(self, field: Tensor, kp_s: Tensor, kp_d: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Stretch the field evenly between open lips.

        There it has no keypoints and would come close to a fold; mending that by smoothing would drag the lips along.
        """
        x, y = (
            self._axis(self.config.grid, width)[None, None],
            self._axis(self.config.grid, height)[None, :, None],
        )
        s, d = kp_s[..., :2], kp_d[..., :2]
        v, u, top, low, top_s, low_s, u_s = self._mouth_curves(s, d, x, y)
        gap = (low - top).clamp_min(1e-3)
        part = ((v - top) / gap).clamp(0.0, 1.0)
        inside = torch.minimum(torch.minimum(v - top, low - v), torch.minimum(u, 1 - u))
        mask = (inside > 0).to(field.dtype) * _soft_step((gap - 0.02) / 0.06)
        gap_s = torch.maximum(low_s - top_s, 2.5 * self.config.min_jacobian * gap)
        middle = 0.5 * (top_s + low_s)
        x_s, y_s = self._from_frame(self._frame(s, _MOUTH_CORNERS), u_s, middle + (part - 0.5) * gap_s)
        return field + mask[:, None] * (torch.stack((x_s - x, y_s - y), 1) - field)

    def _mouth(self, kp_s: Tensor, kp_d: Tensor, x: Tensor, y: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """What is inside the lips, at positions ``x [1, 1, G]``, ``y [1, G, 1]``.

        Upper teeth belong to the skull, so what the source shows hangs from the upper lip; the last
        third hangs from the lower lip; what lies between was never seen and is synthesised.

        Returns:
            mask, sampling position x and y in the source crop, share of synthetic interior, share of teeth
            (positive) or tongue (negative) in it; each ``[N, G, G]``.
        """
        frame, frame_s = self._frame(kp_d, _MOUTH_CORNERS), self._frame(kp_s, _MOUTH_CORNERS)
        v, u, top, low, top_s, low_s, u_s = self._mouth_curves(kp_s, kp_d, x, y)
        from_top, from_low = v - top, low - v
        inside = torch.minimum(torch.minimum(from_top, from_low), torch.minimum(u, 1 - u))
        per_cell = frame[2][:, :, None] / cell
        # An open mouth has the middle of its soft edge on the lip, a closed one has no inside at all.
        lift = 0.5 * _soft_step((low - top) * per_cell / 2)
        mask = _soft_step(inside * per_cell / 1.2 + lift)
        seen = low_s - top_s
        depth = torch.maximum(torch.minimum(from_top, 0.65 * seen), torch.minimum(from_top, seen - from_low))
        x_s, y_s = self._from_frame(frame_s, u_s, top_s + depth)

        unseen = _soft_step((from_top - 0.65 * seen) / 0.03 + lift) * _soft_step(
            (from_low - 0.35 * seen) / 0.03 + lift
        )
        centre = (1 - (2 * u - 1) ** 2).clamp(0.0, 1.0)
        teeth = _soft_step((0.14 * centre - from_top) / 0.05) * _soft_step((low - top - 0.12) / 0.2)
        teeth = teeth * _soft_step(from_top / 0.06 + 0.25) * _soft_step((0.08 - seen) / 0.06) * centre
        opening = (low - top).clamp_min(0.05)
        tongue = _soft_step((from_top / opening - 0.35) / 0.6) * _soft_step((opening - 0.06) / 0.15) * centre
        return mask, x_s, y_s, unseen, teeth - tongue

    def _eye(
        self, side: int, kp_s: Tensor, kp_d: Tensor, x: Tensor, y: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lids and eyeball of one eye, at positions ``x [1, 1, G]``, ``y [1, G, 1]``.

        From crease to lid the skin is stretched, so a closing lid covers the eyeball; between the lids the
        eyeball follows the iris; below, the lower lid's skin is stretched.

        Returns:
            mask, sampling position x and y in the source crop, share of lashes; each ``[N, G, G]``.
        """
        corners, iris, rows = _EYE_CORNERS[side], _IRIS_CENTRES[side], self.eye_rows[side]
        frame, frame_s = self._frame(kp_d, corners), self._frame(kp_s, corners)
        u_nodes, v_nodes = self._nodes(frame, kp_d, rows)
        u_nodes_s, v_nodes_s = self._nodes(frame_s, kp_s, rows)
        u, v = self._pixels_to_frame(frame, x, y)
        top, low, crease, below, top_s, low_s, crease_s, below_s, u_s = self._curves(
            u_nodes, torch.cat((v_nodes, v_nodes_s, u_nodes_s[:, None]), 1), u
        )
        low, low_s = torch.maximum(low, top), torch.maximum(low_s, top_s)
        # A rim is drawn a little inside the lid; a closing lid must not drag lashes and white along.
        shut = 1 - ((low - top) / (low_s - top_s).clamp_min(0.02)).clamp(0.0, 1.0)
        top_s = top_s - 0.62 * shut * (top_s - crease_s).clamp_min(0.0)
        low_s = low_s + 0.05 * shut
        upper_skin, lower_skin = (top - crease).clamp_min(0.02), (below - low).clamp_min(0.02)
        upper = crease_s + (v - crease) / upper_skin * (top_s - crease_s)
        lower = low_s + (v - low) / lower_skin * (below_s - low_s)
        iris_u, iris_v = (t[..., None] for t in self._to_frame(frame, kp_d[:, iris : iris + 1]))
        iris_u_s, iris_v_s = (t[..., None] for t in self._to_frame(frame_s, kp_s[:, iris : iris + 1]))
        widen = ((low_s - top_s) / (low - top).clamp_min(1e-3)).clamp(0.3, 1.0)
        ball = torch.maximum(torch.minimum((v - iris_v) * widen + iris_v_s, low_s), top_s)

        scale = frame[2][:, :, None] / cell
        in_ball = ((v - top) * scale).clamp(0.0, 1.0)
        in_lower = ((v - low) * scale + 1.0).clamp(0.0, 1.0)
        v_s = upper + in_ball * (ball - upper)
        v_s = v_s + in_lower * (lower - v_s)
        gaze = (iris_u_s - iris_u).clamp(-0.25, 0.25) * (1 - (2 * u - 1) ** 2).clamp(0.0, 1.0)
        x_s, y_s = self._from_frame(frame_s, u_s + gaze * in_ball * (1 - in_lower), v_s)
        rim = torch.minimum((v - crease) / upper_skin, (below - v) / lower_skin)
        mask = _soft_step(rim / 0.35) * _soft_step(torch.minimum(u, 1 - u) / 0.12)
        # Where the lids meet the mapping jumps across the eyeball; the line of the lashes covers the jump.
        lashes = (
            0.65 * _soft_step((shut - 0.55) / 0.35) * (1.5 - (v - top).abs() * scale).clamp(0.0, 1.0) * mask
        )
        return mask, x_s, y_s, lashes

    # -- the whole ----------------------------------------------------------------------------------

    def deformation(self, kp_source: Tensor, kp_driving: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Displacement ``[N, 2, grid, grid]`` in pixels after the fold guard."""
        field = self._displacement(kp_source, kp_driving, height, width)
        return self._unfold(self._open_mouth(field, kp_source, kp_driving, height, width), height, width)

    def forward(self, image: Tensor, kp_source: Tensor, kp_driving: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        c = self.config
        h, w = image.shape[1], image.shape[2]
        height = torch.scalar_tensor(h, dtype=torch.float32)
        width = torch.scalar_tensor(w, dtype=torch.float32)
        n = kp_driving.shape[0]
        field = self.deformation(kp_source, kp_driving, height, width)
        gx, gy = self._axis(c.grid, width), self._axis(c.grid, height)
        deformation = torch.stack((gx[None, None] + field[:, 0], gy[None, :, None] + field[:, 1]), -1)

        # Not every target moves uint8 around: it is cast right at the graph's input and output.
        pixels = image.to(torch.float32).permute(0, 3, 1, 2).expand(n, -1, -1, -1)
        to_unit = torch.stack((2 / width, 2 / height))
        lip = (kp_source[:, self.lips, :2] + 0.5) * to_unit - 1
        lip_colour = F.grid_sample(
            pixels, lip[:, None], mode="bilinear", padding_mode="border", align_corners=False
        )
        lip_colour = lip_colour.mean((2, 3))[..., None, None]
        dark = 0.16 * lip_colour
        tongue = 0.42 * lip_colour
        tooth = ((0.5 * lip_colour.mean(1, keepdim=True) + 0.58 * lip_colour).clamp(0, 235) - dark) * 0.8

        # Compose motion, eyes and mouth on one grid, so that the full resolution sees as few operations as possible.
        mx, my = (
            self._axis(c.detail_grid, width)[None, None],
            self._axis(c.detail_grid, height)[None, :, None],
        )
        field = F.interpolate(
            field, size=(c.detail_grid, c.detail_grid), mode="bilinear", align_corners=False
        )
        s, d, cell = kp_source[..., :2], kp_driving[..., :2], width / c.detail_grid
        dx, dy = field.unbind(1)
        lashes = torch.zeros_like(dx)
        for eye in (0, 1):
            mask, x_s, y_s, line = self._eye(eye, s, d, mx, my, cell)
            dx, dy = dx + mask * (x_s - mx - dx), dy + mask * (y_s - my - dy)
            lashes = lashes + line
        mask, x_s, y_s, unseen, inside = self._mouth(s, d, mx, my, cell)
        dx, dy = dx + mask * (x_s - mx - dx), dy + mask * (y_s - my - dy)
        blend = unseen * mask
        planes = torch.stack((dx * (2 / width), dy * (2 / height), blend + lashes, blend * inside), 1)
        planes = F.interpolate(planes, size=(h, w), mode="bilinear", align_corners=False)

        px = (torch.arange(w, dtype=torch.float32) + 0.5) * (2 / width) - 1
        py = (torch.arange(h, dtype=torch.float32) + 0.5) * (2 / height) - 1
        # Clamped to the outermost pixel centres, so zero padding is never seen; runtimes sample it several
        # times faster than border padding.
        grid_x = (planes[:, 0] + px[None, None]).clamp(px[0], px[-1])
        grid_y = (planes[:, 1] + py[None, :, None]).clamp(py[0], py[-1])
        grid = torch.stack((grid_x, grid_y), -1)
        warped = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        # Both colours are positive, so that the larger product is that of teeth above 0 and of the tongue below.
        shade = planes[:, 3:]
        out = warped + planes[:, 2:3] * (dark - warped) + torch.maximum(shade * tooth, shade * -tongue)
        out = torch.round(out).permute(0, 2, 3, 1)
        return out.to(torch.uint8), deformation  # a blend of colours within 0..255 stays there
