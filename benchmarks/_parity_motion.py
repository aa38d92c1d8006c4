"""Our motion composition against golden keypoints; the body of ``python benchmarks/parity.py motion FILE.npz``.

A file holds ``meta`` (JSON: a list of cases ``{source, driving, n, options, official_error}``), what the motion extractor said
about source and driving frames (``source_M_*``, ``driving_M_*``, raw), landmarks (``*_lmks [T, 203, 2]``), a template
(``template_scale|R|exp|t``, ratios where it has them) and per case i what the reference handed to the warp:
``kp_source_i``, ``kp_driving_i [frames, 21, 3]``. Options carry the reference's flag names.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import open_bundle
from lp_edge.errors import ConfigError, LpEdgeError, MediaError
from lp_edge.runtime.liveportrait_motion import (
    ComposeOptions,
    Composer,
    LivePortraitSource,
    Retargeting,
    RunnerRetargeting,
    degrees_from_logits,
    eye_ratio_203,
    lip_ratio_203,
    motion_from_outputs,
)
from lp_edge.runtime.liveportrait_options import LivePortraitOptions
from lp_edge.runtime.motion import Motion

__all__ = ["TOLERANCE", "compose_case", "motion_items"]

F32 = npt.NDArray[np.float32]

TOLERANCE = 1e-4
# Where a template has no ratios: image-left eye, image-right eye, lips.
TEMPLATE_RATIOS = (0.3, 0.32, 0.1)
FLAGS = {
    "flag_stitching": "stitching",
    "flag_eye_retargeting": "eye_retargeting",
    "flag_lip_retargeting": "lip_retargeting",
    "flag_normalize_lip": "normalize_lip",
    "flag_source_video_eye_retargeting": "source_video_eye_retargeting",
    "driving_option": "driving_option",
    "lip_normalize_threshold": "lip_normalize_threshold",
    "source_video_eye_retargeting_threshold": "source_video_eye_threshold",
    "driving_smooth_observation_variance": "smooth_variance",
}
SHARED = {
    "flag_relative_motion": "relative",
    "animation_region": "region",
    "driving_multiplier": "multiplier",
}


class _TorchRetargeting:
    """S, R_eye, R_lip as modules."""

    def __init__(self, networks: Any) -> None:
        self._networks = networks

    def _run(self, network: Any, features: F32) -> F32:
        import torch

        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(features)).numpy(), np.float32)

    def stitching(self, features: F32, /) -> F32:
        return self._run(self._networks.stitching, features)

    def eye(self, features: F32, /) -> F32:
        return self._run(self._networks.retarget_eye, features)

    def lip(self, features: F32, /) -> F32:
        return self._run(self._networks.retarget_lip, features)


def open_retargeting(
    stack: ExitStack, *, weights: Path | None, bundle: Path | None, allow_unverified: bool
) -> Retargeting:
    """S and R from a bundle (its runners, closed by ``stack``) or from the checkpoints (torch)."""
    if bundle is not None and weights is None:
        opened, cpu = open_bundle(bundle), BackendConfig("cpu", threads=1)
        runners = [
            stack.enter_context(opened.runner(name, cpu))
            for name in (names.STITCHING, names.RETARGET_EYE, names.RETARGET_LIP)
        ]
        return RunnerRetargeting(*runners)
    if weights is None or bundle is not None:
        raise ConfigError(
            f"weights {weights}, bundle {bundle}", "expected exactly one of the two", "name one of them"
        )
    from lp_edge.export.checkpoints import load_networks
    from lp_edge.export.inventory import FILES, STITCHING_FILE

    networks, _ = load_networks(
        weights,
        allow_unverified=allow_unverified,
        files={STITCHING_FILE: FILES["human"][STITCHING_FILE]},
    )
    return _TorchRetargeting(networks)


def _options(case: Mapping[str, Any]) -> ComposeOptions:
    given = case["options"]
    unknown = sorted(set(given) - set(FLAGS) - set(SHARED))
    if unknown:
        raise ConfigError(
            f"unknown option {', '.join(unknown)}",
            f"expected {', '.join((*SHARED, *FLAGS))}",
            "correct the file, or teach this benchmark the option",
        )
    # What a case leaves out is as in the reference's InferenceConfig, not as on its command line.
    base = LivePortraitOptions(driving_option="pose-friendly", normalize_lip=True)
    own = replace(base, **{FLAGS[k]: v for k, v in given.items() if k in FLAGS})
    return ComposeOptions(liveportrait=own, **{SHARED[k]: v for k, v in given.items() if k in SHARED})


def _extracted(table: Mapping[str, npt.NDArray[Any]], who: str) -> list[LivePortraitSource]:
    raw = {name: table[f"{who}_M_{name}"] for name in ("pitch", "yaw", "roll", "t", "exp", "scale", "kp")}
    for name in (names.PITCH, names.YAW, names.ROLL):
        raw[name] = degrees_from_logits(raw[name])
    eyes, lips = eye_ratio_203(table[f"{who}_lmks"]), lip_ratio_203(table[f"{who}_lmks"])
    found = []
    for i in range(len(raw["kp"])):
        m, kp = motion_from_outputs(raw, i)
        motion = Motion(m.rotation, m.translation, m.scale, m.expression, eyes[i], lips[i])
        found.append(LivePortraitSource(motion, kp))
    return found


def _template(table: Mapping[str, npt.NDArray[Any]]) -> Motion:
    rotation = table["template_R" if "template_R" in table else "template_R_d"]
    count = len(rotation)

    def ratios(name: str, default: Sequence[float]) -> F32:
        keys = (f"template_c_{name}", f"template_c_{name}_lst", f"template_c_d_{name}_lst")
        key = next((key for key in keys if key in table), None)
        rows = np.tile(default, (count, 1)) if key is None else table[key].reshape(count, -1)
        return rows.astype(np.float32)

    return Motion(
        rotation=np.swapaxes(rotation.reshape(count, 3, 3), 1, 2),
        translation=table["template_t"].reshape(count, 3),
        scale=table["template_scale"].reshape(count),
        expression=table["template_exp"].reshape(count, 21, 3),
        eye_ratio=ratios("eyes", TEMPLATE_RATIOS[:2]),
        lip_ratio=ratios("lip", TEMPLATE_RATIOS[2:])[:, 0],
    )


def compose_case(
    table: Mapping[str, npt.NDArray[Any]], case: Mapping[str, Any], networks: Retargeting
) -> tuple[F32, F32]:
    """Keypoints ``(source, driving)``, float32 ``[frames, 21, 3]``, of one case.

    Raises:
        ConfigError: the case holds an option or a kind of source or driver that is not known.
    """
    for key, choices in (("source", ("image", "video")), ("driving", ("image", "video", "template"))):
        if case[key] not in choices:
            raise ConfigError(f"{key} is {case[key]!r}", f"expected {', '.join(choices)}", "correct the file")
    options, n = _options(case), int(case["n"])
    source_video = case["source"] == "video"
    sources = _extracted(table, "source")[: n if source_video else 1]
    if case["driving"] == "template":
        template = _template(table)
        drivers = [template[i] for i in range(min(n, len(template)))]
    else:
        drivers = [face.motion for face in _extracted(table, "driving")]
        drivers = drivers[: n if case["driving"] == "video" else 1]
    moving = case["driving"] == "video" or (case["driving"] == "template" and len(drivers) > 1)
    driving: Literal["image", "video"] = "video" if moving else "image"
    composer = Composer(networks, options, source_video=source_video, driving=driving)
    if source_video and not moving:
        drivers *= len(sources)
    if not source_video:
        sources *= len(drivers)
    composer.plan([source.motion for source in sources], drivers)
    pairs = [
        composer.compose(source, driver, drivers[0])
        for source, driver in zip(sources, drivers, strict=False)  # the shorter clip counts
    ]
    kp_source, kp_driving = (np.stack(side) for side in zip(*pairs, strict=True))
    return kp_source, kp_driving


def motion_items(
    file: Path, *, weights: Path | None, bundle: Path | None, allow_unverified: bool
) -> Iterator[dict[str, Any]]:
    """One dictionary per case: ``item``, ``max_abs_error``, ``tolerance``, ``ok``; ``error`` where there is nothing to compare.

    A case on which the reference itself fails has ``skipped`` with its reason instead of ``ok``.

    Args:
        file: of the form described above.
        weights: folder of the checkpoints.
        bundle: or a bundle with S and R; exactly one of the two.
        allow_unverified: take checkpoints that are not the official ones.

    Raises:
        MediaError: the file cannot be read.
        ConfigError, BundleError, ExportError: weights or bundle cannot be used.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            table = dict(archive)
        cases = json.loads(str(table["meta"]))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise MediaError(f"cannot read {file}: {error}", "golden motion (.npz)", "check the file") from error
    with ExitStack() as stack:
        networks = open_retargeting(stack, weights=weights, bundle=bundle, allow_unverified=allow_unverified)
        for i, case in enumerate(cases):
            yield _item(table, i, case, networks)


def _item(
    table: Mapping[str, npt.NDArray[Any]], i: int, case: Mapping[str, Any], networks: Retargeting
) -> dict[str, Any]:
    item: dict[str, Any] = {"item": f"{i} {case.get('source')} <- {case.get('driving')}"}
    if (reason := case.get("official_error")) is not None:
        return {**item, "skipped": f"the reference fails: {reason}"}
    item |= {"max_abs_error": None, "tolerance": TOLERANCE, "ok": False}
    try:
        ours = compose_case(table, case, networks)
        golden = table[f"kp_source_{i}"], table[f"kp_driving_{i}"]
    except LpEdgeError as error:
        return {**item, "error": str(error)}
    except KeyError as error:
        return {**item, "error": f"the file has no {error}"}
    if any(a.shape != b.shape for a, b in zip(ours, golden, strict=True)):
        shapes = [list(a.shape) for a in (*ours, *golden)]
        return {**item, "error": f"shapes {shapes[:2]}; expected {shapes[2:]}"}
    worst = max(float(np.abs(a - b).max()) for a, b in zip(ours, golden, strict=True))
    if not math.isfinite(worst):
        return {**item, "error": "a keypoint is no finite number"}
    return {**item, "max_abs_error": worst, "ok": worst <= TOLERANCE}
