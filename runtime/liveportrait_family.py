"""Adapter of the ``liveportrait`` family: 21 implicit keypoints, a feature volume, a network that draws 512x512 crops.

Expects a bundle that ``lp-export --family liveportrait`` wrote. Crops are cut from the landmarks of
:mod:`lp_edge.runtime.landmarks203` (our mesh), or of the user's own face models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import Bundle
from lp_edge.engines.runner import Array, Runner, to_host
from lp_edge.runtime.crop import (
    CROP_SIZE,
    INPUT_SIZE,
    average_box,
    driving_box,
    driving_crop,
    source_matrix,
)
from lp_edge.runtime.edit import Edits, liveportrait_delta
from lp_edge.runtime.face_motion import Canonical
from lp_edge.runtime.family import DriverKind, Family, Follower, Portrait
from lp_edge.runtime.landmarks203 import LandmarkSource, MeshLandmarks
from lp_edge.runtime.liveportrait_motion import (
    LIP_ARRAY,
    ComposeOptions,
    Composer,
    LivePortraitSource,
    Retargeting,
    RunnerRetargeting,
    edit_keypoints,
    eye_ratio_203,
    lip_ratio_203,
    motion_from_outputs,
)
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.paste_back import resized_to_frame
from lp_edge.runtime.pixels import Download, Pixels
from lp_edge.runtime.templates import MotionTemplate, load_template

__all__ = ["LivePortraitFamily", "LivePortraitNetworks", "LivePortraitPortrait", "open_liveportrait"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LivePortraitNetworks:
    """The networks that see pixels, and S, R_eye, R_lip behind one interface."""

    appearance: Runner
    motion: Runner
    warp_decode: Runner
    retargeting: Retargeting


@dataclass(frozen=True)
class Measure:
    """A source face without pixels, about 500 bytes: where its crop lies, its keypoints and ratios."""

    to_crop: F64
    source: LivePortraitSource


@dataclass(frozen=True)
class LivePortraitPortrait(Portrait):
    """A face of a source frame, prepared for rendering.

    Attributes:
        to_crop: float64 ``[3, 3]``, pixels of the frame → pixels of the 512x512 crop.
        source: canonical keypoints and motion of the face.
        features: outputs of the appearance network by name, what ``warp_decode`` takes besides keypoints; on the device
            where the backend keeps them there.
    """

    to_crop: F64
    source: LivePortraitSource
    features: Mapping[str, Array]


@dataclass(frozen=True)
class _Reading:
    """A driving face before its crop is known."""

    box: F64
    eye_ratio: F32
    lip_ratio: float


class LivePortraitFollower(Follower[LivePortraitPortrait]):
    """Composes as the reference does; see :class:`lp_edge.runtime.liveportrait_motion.Composer`."""

    def __init__(self, networks: Retargeting, options: ComposeOptions, composer: Composer | None) -> None:
        self._networks, self._options, self._composer = networks, options, composer

    def plan(self, sources: Sequence[Motion], driving: Sequence[Motion], neutral: Motion) -> None:
        """Smooth a source clip's motion as a whole."""
        if self._composer is not None:
            self._composer.plan(sources, driving, neutral)

    def keypoints(
        self, index: int, portrait: LivePortraitPortrait, driving: Motion, neutral: Motion, edits: Edits
    ) -> tuple[F32, F32]:
        """Source and driving keypoints ``[21, 3]``."""
        own_eyes = float(np.mean(portrait.source.motion.eye_ratio))
        delta = liveportrait_delta(edits, own_eyes) if edits else None
        if self._composer is None:
            return edit_keypoints(portrait.source, delta, self._networks, self._options)
        return self._composer.compose(portrait.source, driving, neutral, delta, index=index)


class LivePortraitFamily(Family[LivePortraitPortrait]):
    """Prepares sources, reads motion and renders for the ``liveportrait`` family.

    Args:
        networks: open runners.
        landmarks: gives 203 landmarks for a face.
        canonical: the mesh's canonical face, for built-in templates.
        pixels: cuts, resizes and pastes crops.
        animal: the networks are those of the animal variant, whose motion is composed differently.
    """

    name = "liveportrait"

    def __init__(
        self,
        networks: LivePortraitNetworks,
        landmarks: LandmarkSource,
        canonical: Canonical,
        pixels: Pixels,
        *,
        animal: bool = False,
    ) -> None:
        self._networks, self._landmarks, self._canonical = networks, landmarks, canonical
        self._pixels, self._animal = pixels, animal
        self.backend, self.max_batch = networks.warp_decode.backend, networks.warp_decode.max_batch
        self.resident, self.accelerated = pixels.resident, networks.warp_decode.resident
        self.mixes_portraits = self.accelerated  # on a CPU a batch is no faster than its rows
        inputs = networks.warp_decode.inputs
        self._carried = [n for n in networks.appearance.outputs if n in inputs]

    # -- sources ---------------------------------------------------------------------------------------

    def measure(self, frame: U8, points: F32, options: AnimateOptions, *, clip: bool) -> Measure:
        """Crop, keypoints, pose, expression, eye and lip ratios of a source face (M runs once)."""
        landmarks = self._landmarks.landmarks(frame, points)
        outline = landmarks if clip else self._landmarks.picture_points(frame, points)
        to_crop = source_matrix(outline, options.crop)
        motion, kp = self._extract(self._network_input(frame, to_crop, clip))
        return Measure(to_crop, LivePortraitSource(_with_ratios(motion, landmarks), kp))

    def motion_of_measure(self, measure: Measure) -> Motion:
        """Pose and expression as M sees them."""
        return measure.source.motion

    def portrait(
        self, frame: U8, measure: Measure, options: AnimateOptions, *, clip: bool
    ) -> LivePortraitPortrait:
        """Cut the crop and extract its appearance (F runs once)."""
        crop = self._network_input(frame, measure.to_crop, clip)
        features = self._networks.appearance.infer({names.IMAGE: crop}, self._carried, keep=True)
        size = self.crop_size(options)
        to_frame = resized_to_frame(np.linalg.inv(measure.to_crop), CROP_SIZE, size)
        place = self._pixels.place(self._frame(frame, clip), to_frame, size)
        source = measure.source
        return LivePortraitPortrait(frame, source.motion, place, measure.to_crop, source, features)

    def _frame(self, frame: U8, clip: bool) -> Array:
        """The frame where its crops are cut: a clip's goes to the device, a picture's part that matters is taken there once."""
        return self._pixels.frame(frame) if clip else frame

    def _network_input(self, frame: U8, to_crop: F64, clip: bool) -> Array:
        """uint8 ``[1, 256, 256, 3]``, the crop as the extractors see it."""
        return self._pixels.crop(self._frame(frame, clip), to_crop, reduce=CROP_SIZE // INPUT_SIZE)

    def measures_whole_clip(self, kind: DriverKind) -> bool:
        """A clip that drives a clip is smoothed as a whole."""
        return kind == "video"

    # -- drivers ---------------------------------------------------------------------------------------

    def read(self, rgb: U8, points: F32, options: AnimateOptions) -> _Reading:
        """Box and ratios of a driving face."""
        landmarks = self._landmarks.landmarks(rgb, points)
        eyes, lips = eye_ratio_203(landmarks), lip_ratio_203(landmarks)
        return _Reading(driving_box(landmarks, options.crop), np.asarray(eyes, np.float32), float(lips))

    def needs_common_box(self, size: tuple[int, int], options: AnimateOptions) -> bool:
        """As the reference: clips that are not square are cut around the face, square ones count as cut already."""
        return options.driving_crop == "on" or (options.driving_crop == "auto" and size[0] != size[1])

    def common_box(self, readings: Sequence[_Reading]) -> F32 | None:
        """The mean of all frames' boxes."""
        return np.asarray(average_box([r.box for r in readings]), np.float32)

    def motion(self, rgb: U8, reading: _Reading, box: F32 | None, options: AnimateOptions) -> Motion:
        """Pose and expression of a driving frame, cut with ``box`` or taken whole."""
        if box is None:
            small = cv2.resize(rgb, (INPUT_SIZE, INPUT_SIZE), interpolation=cv2.INTER_AREA)
            image = np.asarray(small, np.uint8)
        else:
            image = driving_crop(rgb, box).network_input()
        motion, _ = self._extract(image[None])
        return replace(motion, eye_ratio=reading.eye_ratio, lip_ratio=np.float32(reading.lip_ratio))

    def picture_neutral(self, motion: Motion) -> Motion:
        """The same pose with the expression that the reference takes for neutral (its lip array)."""
        return replace(motion, expression=LIP_ARRAY)

    def load_template(self, path: str | Path) -> MotionTemplate:
        """A template of LivePortrait, or a built-in one made of edits."""
        return load_template(path, self._canonical, family=self.name)

    # -- rendering -------------------------------------------------------------------------------------

    def follower(
        self, options: AnimateOptions, kind: DriverKind, *, source_clip: bool
    ) -> LivePortraitFollower:
        """A follower with its own first frame."""
        how = ComposeOptions(
            relative=options.relative,
            region=options.region,
            multiplier=options.multiplier,
            liveportrait=replace(options.liveportrait, animal=self._animal),
        )
        composer = None
        if kind != "edit":
            composer = Composer(self._networks.retargeting, how, source_video=source_clip, driving=kind)
        return LivePortraitFollower(self._networks.retargeting, how, composer)

    def render(
        self, portraits: Sequence[LivePortraitPortrait], kp_source: Sequence[F32], kp_driving: Sequence[F32]
    ) -> Array:
        """Animated crops uint8 ``[N, 512, 512, 3]``."""
        warp, one = self._networks.warp_decode, portraits[0]
        features = one.features
        if any(portrait is not one for portrait in portraits):
            features = {name: warp.concatenate([p.features[name] for p in portraits]) for name in features}
        feeds: dict[str, Array] = {
            **features,
            names.KP_SOURCE: np.stack(list(kp_source)).astype(np.float32),
            names.KP_DRIVING: np.stack(list(kp_driving)).astype(np.float32),
        }
        return warp.infer(feeds, [names.IMAGE], keep=True)[names.IMAGE]

    def crop_size(self, options: AnimateOptions) -> int:
        """The size asked for, else what the networks draw."""
        return options.size or CROP_SIZE

    def crops_alone(
        self, portrait: LivePortraitPortrait, crops: Array, options: AnimateOptions
    ) -> list[Callable[[], U8]]:
        """The crops themselves."""
        download = Download(self._pixels.resize(crops, self.crop_size(options)))
        return [partial(download.picture, row) for row in range(crops.shape[0])]

    def still_crop(self, portrait: LivePortraitPortrait) -> Array:
        """The source's 512x512 crop."""
        return self._pixels.crop(portrait.frame, portrait.to_crop)

    def _extract(self, crop: Array) -> tuple[Motion, F32]:
        """Motion and canonical keypoints ``[21, 3]`` of one crop uint8 ``[1, 256, 256, 3]``."""
        out = self._networks.motion.infer({names.IMAGE: crop})
        return motion_from_outputs({name: to_host(array) for name, array in out.items()})


def _with_ratios(motion: Motion, landmarks: npt.NDArray[np.floating]) -> Motion:
    eyes, lips = eye_ratio_203(landmarks), lip_ratio_203(landmarks)
    return replace(motion, eye_ratio=np.asarray(eyes, np.float32), lip_ratio=np.asarray(lips, np.float32))


def open_liveportrait(
    bundle: Bundle,
    config: BackendConfig,
    stack: ExitStack,
    face_models: Path | None,
    wrap: Callable[[Runner], Runner],
    open_pixels: Callable[[Runner], Pixels],
) -> LivePortraitFamily:
    """The adapter with the networks of a bundle; ``stack`` closes them.

    Args:
        bundle: a bundle of the family.
        config: where its networks run. Drawing takes nearly all of the time, so on a CPU they get all cores.
        face_models: see :func:`lp_edge.runtime.insightface.open_face_models`; None = our own mesh.
        wrap: takes every network as it is opened and gives what is called in its place.
        open_pixels: what cuts and pastes beside the network that draws.

    Raises:
        BundleError, BackendUnavailable, EngineError, ConfigError: something cannot be opened.
    """

    def runner(name: str) -> Runner:
        return stack.enter_context(wrap(bundle.runner(name, config)))

    networks = LivePortraitNetworks(
        runner(names.APPEARANCE),
        runner(names.MOTION),
        runner(names.WARP_DECODE),
        RunnerRetargeting(runner(names.STITCHING), runner(names.RETARGET_EYE), runner(names.RETARGET_LIP)),
    )
    landmarks: LandmarkSource = MeshLandmarks()
    if face_models is not None:
        from lp_edge.runtime.insightface import open_face_models

        landmarks = open_face_models(face_models, config, stack, wrap)
    canonical = Canonical.from_table(bundle.load_table("canonical"))
    animal = bundle.manifest.variant == "animal"
    pixels = open_pixels(networks.warp_decode)
    return LivePortraitFamily(networks, landmarks, canonical, pixels, animal=animal)
