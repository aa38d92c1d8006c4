"""Device pixels against host pixels, on CPU runners: with NumPy arrays, and with arrays that cannot be read by accident."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.device import DeviceArray
from lp_edge.engines.runner import Array, Runner, to_host
from lp_edge.engines.trt_build import TensorRtConfig, profile_of
from lp_edge.errors import ConfigError, EngineError
from lp_edge.runtime import pixels as module
from lp_edge.runtime.crop import cut
from lp_edge.runtime.paste_back import PastePlan, paste_back
from lp_edge.runtime.pixels import (
    DevicePixels,
    Drawn,
    HostPixels,
    Pixels,
    Place,
    graph_file,
    graph_options,
    open_device_graph,
)
from lp_edge.runtime.resample import resize_crop
from lp_edge.runtime.server.portraits import memory_of

CPU = BackendConfig("cpu", threads=1)
warps = pytest.mark.skipif(
    int(cv2.__version__.partition(".")[0]) < 5, reason="OpenCV 4 rounds positions to 1/32 pixel"
)


class OnDevice(DeviceArray):
    """An array that can only be used as one on a device can: no item of it can be had without a download."""

    def __init__(self, held: np.ndarray, log: list[str]) -> None:
        self.held, self.log = held, log

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.held.dtype

    def rows(self, start: int, stop: int) -> OnDevice:
        assert 0 <= start < stop <= len(self.held)
        return OnDevice(self.held[start:stop], self.log)

    def reshape(self, *shape: int) -> OnDevice:
        assert self.held.flags.c_contiguous
        return OnDevice(self.held.reshape(shape), self.log)

    def fetch(self) -> Callable[[], np.ndarray]:
        self.log.append("fetch")

        def wait() -> np.ndarray:
            self.log.append("wait")
            view = self.held.copy()
            view.setflags(write=False)
            return view

        return wait

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.log.append("download")
        return self.held.copy()


class ResidentRunner(Runner):
    """A CPU runner that hands out arrays as a GPU's does, and takes at most ``most`` crops."""

    backend = "stub"
    device = "stub"
    resident = True
    loans = False

    def __init__(self, inner: Runner, log: list[str], most: int | None) -> None:
        super().__init__(inner.name, tuple(inner.inputs.values()), tuple(inner.outputs.values()))
        self.inner, self.log, self.most = inner, log, most

    @property
    def max_batch(self) -> int | None:
        return self.most

    def upload(self, array: np.ndarray) -> Array:
        assert isinstance(array, np.ndarray) and array.flags.c_contiguous
        self.log.append("upload")
        return OnDevice(array.copy(), self.log)

    def concatenate(self, arrays: Any) -> Array:
        assert all(isinstance(a, OnDevice) for a in arrays)
        return arrays[0] if len(arrays) == 1 else OnDevice(np.concatenate([a.held for a in arrays]), self.log)

    def _stage(self, array: Array) -> Array:
        return array.held if isinstance(array, OnDevice) else to_host(array)

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        raise AssertionError("results are to stay on the device")

    def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        self.log.append(self.name)
        if names.CROP in feeds and self.most:
            assert feeds[names.CROP].shape[0] <= self.most
        done = self.inner.infer(feeds, outputs)
        return {name: OnDevice(to_host(array), self.log) for name, array in done.items()}

    def _close(self) -> None:
        self.log.append(f"close {self.name}")
        self.inner.close()


def resident(log: list[str], most: int | None = None) -> DevicePixels:
    return DevicePixels(lambda name: ResidentRunner(open_device_graph(name, CPU), log, most))


@pytest.fixture(scope="module", params=["numpy", "resident"])
def device(request: pytest.FixtureRequest) -> Iterator[DevicePixels]:
    made = DevicePixels(lambda name: open_device_graph(name, CPU))
    with made if request.param == "numpy" else resident([]) as pixels:
        yield pixels  # type: ignore[misc]


HOST = HostPixels()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).integers(0, 256, shape, dtype=np.uint8)


def to_frame(scale: float, degrees: float, x: float, y: float, size: int) -> np.ndarray:
    """Crop px → frame px; the crop's middle lands on (x, y)."""
    c, s = (scale * turn(np.deg2rad(degrees)) for turn in (np.cos, np.sin))
    half = (size - 1) / 2
    return np.array([[c, -s, x - c * half + s * half], [s, c, y - s * half - c * half], [0, 0, 1.0]])


def pasted(place: Place, frame: np.ndarray, crops: Array, **how: Any) -> list[np.ndarray]:
    """Each crop in a frame of its own."""
    outs = []
    for drawn in place.draw(crops, **how):
        outs.append(frame.copy())
        drawn.write(outs[-1])
    return outs


def apart(one: Any, other: Any) -> int:
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape and one.dtype == other.dtype == np.uint8
    return int(np.abs(one.astype(np.int16) - other).max(initial=0))


def inside(rect: tuple[int, ...], outer: tuple[int, ...]) -> bool:
    empty = rect[0] >= rect[2] or rect[1] >= rect[3]
    return empty or (
        outer[0] <= rect[0] and outer[1] <= rect[1] and rect[2] <= outer[2] and rect[3] <= outer[3]
    )


def both_equal(
    device: Pixels, frame: np.ndarray, crops: np.ndarray, matrix: np.ndarray, size: int, *, moving: bool
) -> bool:
    """Check one placement; whether it changes anything."""
    there = device.place(device.frame(frame) if moving else frame, matrix, size)
    here = HOST.place(HOST.frame(frame), matrix, size)
    assert inside(here.rect, there.rect) if moving else here.rect == there.rect
    wanted = pasted(here, frame, crops)
    got = pasted(there, frame, crops)
    assert len(got) == len(wanted) == len(crops)
    assert max(apart(a, b) for a, b in zip(got, wanted, strict=True)) <= 1
    return any((a != frame).any() for a in wanted)


# -- squares that an affine map places -------------------------------------------------------------------

PLACES = {
    "upright": (0.5, 0.0, 150.0, 100.0),
    "turned": (0.4, 33.0, 140.3, 90.7),
    "upside down": (0.45, 180.0, 150.0, 101.0),
    "partly above left": (0.6, 12.0, 20.0, 10.0),
    "partly below right": (0.6, -20.0, 300.0, 190.0),
    "larger than the frame": (3.0, 8.0, 150.0, 100.0),
    "a few pixels": (0.01, 40.0, 30.0, 20.0),
    "outside": (0.2, 10.0, -400.0, 50.0),
}


@warps
@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_placed_crop_is_the_same_within_one_level(
    device: DevicePixels, where: str, count: int, moving: bool
) -> None:
    scale, degrees, x, y = PLACES[where]
    matrix = to_frame(scale * 2, degrees, x, y, 256)
    changed = both_equal(
        device, noise(201, 307, 3), noise(count, 256, 256, 3, seed=1), matrix, 256, moving=moving
    )
    assert changed == (where != "outside")


@warps
@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
@pytest.mark.parametrize("size", [256, 512, 777, 1024])
def test_any_size_of_crop_and_what_the_network_draws_is_resized_to_it(
    device: DevicePixels, size: int, moving: bool
) -> None:
    frame = noise(240, 321, 3)
    matrix = to_frame(0.4 * 512 / size, 17, 160, 120, size)
    for drawn in (size, 512):
        crops = noise(2, drawn, drawn, 3, seed=1)
        assert both_equal(device, frame, crops, matrix, size, moving=moving)


@warps
@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    size=st.integers(2, 90),
    degrees=st.floats(-180, 180),
    scale=st.floats(0.05, 4.0),
    x=st.floats(-0.5, 1.5),
    y=st.floats(-0.5, 1.5),
    moving=st.booleans(),
    black_and_white=st.booleans(),
)
def test_it_holds_for_any_placement(
    device: DevicePixels,
    width: int,
    height: int,
    size: int,
    degrees: float,
    scale: float,
    x: float,
    y: float,
    moving: bool,
    black_and_white: bool,
) -> None:
    frame, crops = noise(height, width, 3), noise(2, size, size, 3, seed=1)
    if black_and_white:
        crops = crops // 128 * 255
    matrix = to_frame(scale, degrees, x * width, y * height, size)
    both_equal(device, frame, crops, matrix, size, moving=moving)


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_only_the_rectangle_is_written(device: DevicePixels, moving: bool) -> None:
    """The region of a moving source is computed from whole lines and in steps; neither is seen in the result."""
    frame = noise(201, 307, 3)
    place = device.place(device.frame(frame) if moving else frame, to_frame(0.5, 20, 140, 100, 128), 128)
    x0, y0, x1, y1 = place.rect
    assert inside(place.rect, (1, 1, 306, 200))
    out = 255 - frame
    place.draw(noise(1, 128, 128, 3))[0].write(out)
    outside = np.ones((201, 307), bool)
    outside[y0:y1, x0:x1] = False
    assert (out[outside] == 255 - frame[outside]).all()
    corner = frame[y0, x0]  # where the mask is 0: the source's own pixel
    assert (out[y0, x0] == corner).all()


def test_a_crop_outside_the_frame_changes_nothing(device: DevicePixels) -> None:
    frame = noise(60, 80, 3)
    for source in (frame, device.frame(frame)):
        place = device.place(source, to_frame(1, 10, -500, 30, 64), 64)
        assert place.rect[0] >= place.rect[2] or place.rect[1] >= place.rect[3]
        assert (pasted(place, frame, noise(1, 64, 64, 3))[0] == frame).all()


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_faces_that_overlap_are_blended_on_the_host_one_after_the_other(
    device: DevicePixels, moving: bool
) -> None:
    frame, crops = noise(120, 300, 3), noise(2, 64, 64, 3, seed=1)
    size = 96  # the crops are resized on the way
    maps = [to_frame(0.5, 10, 70, 60, size), to_frame(0.5, -10, 90, 62, size)]
    source = device.frame(frame) if moving else frame
    drawn = [
        device.place(source, matrix, size).draw(crops[i : i + 1], blend_on_host=True)[0]
        for i, matrix in enumerate(maps)
    ]
    out = frame.copy()
    for one in drawn:
        one.write(out)
    wanted = frame.copy()
    for matrix, crop in zip(maps, crops, strict=True):
        PastePlan.prepare(matrix, (300, 120), size).paste(frame, resize_crop(crop, size), out=wanted)
    assert (out == wanted).all() and (out != frame).any()


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_a_frame_of_another_size_is_refused(device: DevicePixels, moving: bool) -> None:
    frame = noise(60, 80, 3)
    place = device.place(device.frame(frame) if moving else frame, to_frame(0.5, 0, 40, 30, 64), 64)
    [drawn] = place.draw(noise(1, 64, 64, 3))
    for wrong in (noise(60, 81, 3), frame.astype(np.float32)):
        with pytest.raises(ConfigError, match=r"\[60, 80, 3\]"):
            drawn.write(wrong)


# -- upright rectangles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
@pytest.mark.parametrize("rect", [(10, 5, 74, 69), (0, 0, 101, 77), (30, 21, 33, 77)])
def test_a_rectangle_is_the_same_within_one_level(
    device: DevicePixels, rect: tuple[int, int, int, int], moving: bool
) -> None:
    frame = noise(77, 101, 3)
    there, here = (
        device.rect_place(device.frame(frame) if moving else frame, rect),
        HOST.rect_place(frame, rect),
    )
    assert there.rect == here.rect == rect
    x0, y0, x1, y1 = rect
    for count, height, width in ((1, y1 - y0, x1 - x0), (3, max(1, (y1 - y0) // 2), max(1, (x1 - x0) // 3))):
        crops = noise(count, height, width, 3, seed=1)
        got, wanted = pasted(there, frame, crops), pasted(here, frame, crops)
        limit = 0 if height == y1 - y0 else 1
        assert max(apart(a, b) for a, b in zip(got, wanted, strict=True)) <= limit
        assert (got[0] != frame).any()


def test_rectangles_that_overlap_are_blended_on_the_host(device: DevicePixels) -> None:
    frame, crops = noise(80, 100, 3), noise(2, 20, 20, 3, seed=1)
    rects = [(10, 10, 60, 60), (30, 20, 80, 70)]
    out, wanted = frame.copy(), frame.copy()
    for rect, crop in zip(rects, crops, strict=True):
        [drawn] = device.rect_place(frame, rect).draw(crop[None], blend_on_host=True)
        drawn.write(out)
        paste_back(frame, crop, rect, out=wanted)
    assert (out == wanted).all()


# -- crops and sizes -----------------------------------------------------------------------------------------


@warps
@pytest.mark.parametrize("reduce", [1, 2])
@pytest.mark.parametrize("where", PLACES)
def test_a_crop_is_the_same_within_one_level(device: DevicePixels, where: str, reduce: int) -> None:
    scale, degrees, x, y = PLACES[where]
    frame = noise(201, 307, 3)
    to_crop = np.linalg.inv(to_frame(scale, degrees, x, y, 512))
    kept = device.frame(frame)
    got = device.crop(kept, to_crop, reduce=reduce)
    assert apart(got, HOST.crop(frame, to_crop, reduce=reduce)) <= 1
    assert got.shape == (1, 512 // reduce, 512 // reduce, 3)
    # A frame on the host is cut on the host, to the bit.
    assert apart(device.crop(frame, to_crop, reduce=reduce), HOST.crop(frame, to_crop, reduce=reduce)) == 0


@warps
@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 400),
    degrees=st.floats(-180, 180),
    scale=st.floats(0.02, 3.0),
    x=st.floats(-0.5, 1.5),
    y=st.floats(-0.5, 1.5),
)
def test_lines_that_a_crop_does_not_read_are_left_out(
    device: DevicePixels, width: int, height: int, degrees: float, scale: float, x: float, y: float
) -> None:
    frame = noise(height, width, 3)
    to_crop = np.linalg.inv(to_frame(scale, degrees, x * width, y * height, 512))
    got = device.crop(device.frame(frame), to_crop, reduce=2)
    assert apart(got, HOST.crop(frame, to_crop, reduce=2)) <= 1


def test_other_sizes_of_crops_are_cut_on_the_host(device: DevicePixels) -> None:
    frame = noise(100, 120, 3)
    to_crop = np.linalg.inv(to_frame(0.5, 10, 60, 50, 96))
    for reduce in (1, 3):
        wanted = cut(frame, to_crop, size=96).network_input(96 // reduce)[None]
        assert apart(device.crop(device.frame(frame), to_crop, size=96, reduce=reduce), wanted) == 0
    for wrong in (0, 5):
        with pytest.raises(ConfigError, match="divisor of 96"):
            device.crop(frame, to_crop, size=96, reduce=wrong)


@pytest.mark.parametrize(
    ("given", "wanted"), [(512, 256), (512, 128), (512, 300), (512, 1024), (64, 65), (33, 1)]
)
def test_a_resized_crop_is_the_same_within_one_level(device: DevicePixels, given: int, wanted: int) -> None:
    crops = noise(2, given, given, 3)
    got = device.resize(crops, wanted)
    assert apart(got, HOST.resize(crops, wanted)) <= 1
    assert device.resize(crops, given) is crops


@pytest.mark.parametrize("size", [0, 2049])
def test_sizes_out_of_range_are_refused(device: DevicePixels, size: int) -> None:
    for pixels in (HOST, device):
        with pytest.raises(ConfigError, match="1 to 2048"):
            pixels.resize(noise(1, 8, 8, 3), size)
        with pytest.raises(ConfigError, match=r"\[S, S, 3\]"):
            pixels.resize(noise(1, 8, 9, 3), 4)


# -- the host ------------------------------------------------------------------------------------------------


def test_the_host_makes_what_the_functions_make_to_the_bit() -> None:
    frame, crops = noise(120, 160, 3), noise(2, 64, 64, 3, seed=1)
    matrix, rect = to_frame(0.9, 20, 80, 60, 48), (20, 10, 90, 100)
    assert HOST.frame(frame) is frame
    plan = PastePlan.prepare(matrix, (160, 120), 48)
    wanted = [plan.paste(frame, resize_crop(crop, 48)) for crop in crops]
    place = HOST.place(frame, matrix, 48)
    assert place.rect == plan.rect
    for how in ({}, {"blend_on_host": True}):
        assert all((a == b).all() for a, b in zip(pasted(place, frame, crops, **how), wanted, strict=True))
    rects = pasted(HOST.rect_place(frame, rect), frame, crops)
    assert all((a == paste_back(frame, c, rect)).all() for a, c in zip(rects, crops, strict=True))
    assert (HOST.resize(crops, 48) == np.stack([resize_crop(c, 48) for c in crops])).all()
    assert HOST.resize(crops, 64) is crops
    to_crop = np.linalg.inv(to_frame(0.2, 5, 80, 60, 512))
    assert (HOST.crop(frame, to_crop, reduce=2)[0] == cut(frame, to_crop).network_input()).all()


def test_the_host_copies_no_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(
        PastePlan, "paste", lambda self, frame, crop, *, out: seen.append(crop) or seen.append(out)
    )
    frame, crops = noise(60, 80, 3), noise(2, 64, 64, 3)
    out = frame.copy()
    for drawn in HOST.place(frame, to_frame(0.5, 0, 40, 30, 64), 64).draw(crops):
        drawn.write(out)
    assert all(np.shares_memory(a, b) for a, b in zip(seen[::2], crops, strict=True))
    assert all(a is out for a in seen[1::2])


# -- what crosses between host and device ----------------------------------------------------------------------


def test_all_crops_come_down_in_one_download_and_nothing_waits_before_it_is_written() -> None:
    log: list[str] = []
    frame = noise(200, 300, 3)
    with resident(log, most=2) as pixels:
        place = pixels.place(frame, to_frame(0.5, 9, 150, 100, 256), 256)
        assert log == ["upload", "upload"]  # pixels and weight, once
        log.clear()
        drawn = place.draw(OnDevice(noise(5, 512, 512, 3), log))
        assert log == [  # in pieces that the runners take; the weights of the resize go up once
            "upload",
            *[names.RESIZE_CROPS] * 3,
            *[names.PASTE_STILL] * 3,
            "fetch",
        ]
        assert [d.rect for d in drawn] == [place.rect] * 5
        log.clear()
        for one in drawn:
            one.write(frame.copy())
        assert log == ["wait"]
        log.clear()
        place.draw(OnDevice(noise(1, 512, 512, 3), log))
        assert log == [names.RESIZE_CROPS, names.PASTE_STILL, "fetch"]


def test_a_clips_frame_goes_up_once_and_only_results_come_down() -> None:
    log: list[str] = []
    with resident(log) as pixels:
        for index in range(2):
            frame = noise(200, 300, 3, seed=index)
            log.clear()
            kept = pixels.frame(frame)
            assert pixels.frame(frame) is kept and log == ["upload"]
            matrix = to_frame(0.2, 9, 150, 100, 512)
            pixels.crop(kept, np.linalg.inv(matrix), reduce=2)
            place = pixels.place(kept, matrix, 512)
            place.draw(OnDevice(noise(1, 512, 512, 3), log))
            mask = ["upload"] * (index == 0)
            assert log == [
                "upload",
                names.CROP_512_HALVED,
                *mask,
                names.CUT_REGION,
                names.PASTE_MOVING,
                "fetch",
            ]


def test_what_is_blended_on_the_host_is_downloaded_once_too() -> None:
    log: list[str] = []
    frame = noise(100, 100, 3)
    with resident(log) as pixels:
        for source in (frame, pixels.frame(frame)):
            place = pixels.place(source, to_frame(0.5, 0, 50, 50, 64), 64)
            log.clear()
            drawn = place.draw(OnDevice(noise(2, 64, 64, 3), log), blend_on_host=True)
            assert log == ["fetch"]
            for one in drawn:
                one.write(frame.copy())
            assert log == ["fetch", "wait"]


def test_only_the_last_frames_are_remembered() -> None:
    log: list[str] = []
    with resident(log) as pixels:
        frames = [noise(8, 8, 3, seed=i) for i in range(6)]
        kept = [pixels.frame(frame) for frame in frames]
        assert pixels.frame(frames[-1]) is kept[-1] and pixels.frame(frames[0]) is not kept[0]
        assert log.count("upload") == 7
        # One that is forgotten can still be used where the host has to help.
        to_crop = np.linalg.inv(to_frame(0.5, 0, 4, 4, 16))
        assert apart(pixels.crop(kept[1], to_crop, size=16), HOST.crop(frames[1], to_crop, size=16)) == 0


def test_regions_of_a_moving_face_share_shapes() -> None:
    shapes: set[tuple[int, ...]] = set()

    class Watching(ResidentRunner):
        def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
            if self.name == names.PASTE_MOVING:
                shapes.add(feeds[names.PATCH].shape)
            return super()._infer_kept(feeds, outputs)

    with DevicePixels(lambda name: Watching(open_device_graph(name, CPU), [], None)) as pixels:
        for step in range(20):
            frame = noise(300, 400, 3, seed=step)
            matrix = to_frame(1.5 + step / 40, step, 180 + 3 * step, 150 - step, 64)
            pixels.place(pixels.frame(frame), matrix, 64).draw(noise(1, 64, 64, 3))
    assert 1 < len(shapes) <= 4 and all(s[1] % 64 == s[2] % 64 == 0 for s in shapes)


# -- bounds ----------------------------------------------------------------------------------------------------


def test_frames_that_are_too_large_stay_on_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_FRAME_SIDE", 100)
    log: list[str] = []
    caplog.set_level(logging.INFO, "lp_edge")
    frame, crops = noise(90, 101, 3), noise(1, 64, 64, 3)
    with resident(log) as pixels:
        assert pixels.frame(frame) is frame and pixels.frame(frame) is frame
        assert [r.message for r in caplog.records] == [
            "source of 101 x 90 px: done on the CPU in part; device graphs take at most 100 px a side"
        ]
        assert not log
        matrix = to_frame(0.5, 0, 50, 50, 64)
        got = pasted(pixels.place(frame, matrix, 64), frame, crops)
        assert apart(got[0], pasted(HOST.place(frame, matrix, 64), frame, crops)[0]) <= 1


def test_regions_that_are_too_large_are_done_on_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_REGION_SIDE", 100)
    caplog.set_level(logging.INFO, "lp_edge")
    log: list[str] = []
    frame, crops = noise(300, 200, 3), noise(1, 64, 64, 3)
    matrix, rect = to_frame(3.0, 10, 100, 150, 64), (0, 0, 150, 50)
    with resident(log) as pixels:
        kept = pixels.frame(frame)
        log.clear()
        for source in (frame, kept):
            got = pasted(pixels.place(source, matrix, 64), frame, crops)[0]
            assert (got == pasted(HOST.place(frame, matrix, 64), frame, crops)[0]).all()
            got = pasted(pixels.rect_place(source, rect), frame, crops)[0]
            assert (got == pasted(HOST.rect_place(frame, rect), frame, crops)[0]).all()
        to_crop = np.linalg.inv(to_frame(1.0, 10, 100, 150, 512))
        assert apart(pixels.crop(kept, to_crop, reduce=2), HOST.crop(frame, to_crop, reduce=2)) == 0
    assert not [line for line in log if "close" not in line]  # neither uploads nor downloads nor graphs
    assert len(caplog.records) == 2  # one of regions, one of crops


@warps
def test_large_regions_have_a_graph_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL_SIDE", 60)
    opened: list[str] = []

    def open_graph(name: str) -> Runner:
        opened.append(name)
        return ResidentRunner(open_device_graph(name, CPU), [], 1 if name.endswith("_large") else 4)

    frame, crops = noise(120, 140, 3), noise(2, 32, 32, 3)
    with DevicePixels(open_graph) as pixels:
        for scale in (1.0, 3.0):
            matrix = to_frame(scale, 0, 70, 60, 32)
            got = pasted(pixels.place(frame, matrix, 32), frame, crops)
            wanted = pasted(HOST.place(frame, matrix, 32), frame, crops)
            assert max(apart(a, b) for a, b in zip(got, wanted, strict=True)) <= 1
    assert opened == [names.PASTE_STILL, names.PASTE_STILL + "_large"]


GRAPHS = sorted(module._RANGES)


@pytest.mark.parametrize("name", GRAPHS)
def test_an_engine_covers_all_sizes_up_to_the_bounds(name: str) -> None:
    """What TensorRT is told of a graph, from the options to the profile."""
    networks = BackendConfig(
        "tensorrt",
        device=1,
        provider_options={
            "cache_dir": "/engines",
            "max_batch": "16",
            "axes": "height=64:256:640",
            "slots": "3",
        },
    )
    config = graph_options(networks, name)
    assert config.device == 1
    options = dict(config.provider_options)
    assert options.pop("cache_dir") == "/engines"
    settings = TensorRtConfig.from_options(options)
    assert settings.slots == 3 and not settings.tf32 and not settings.cuda_graphs
    with open_device_graph(name, CPU) as runner:
        inputs = runner.inputs
    profile = profile_of(name, tuple(inputs.values()), settings, settings.max_batch)

    def covers(tensor: str, *shape: int) -> bool:
        low, _, high = profile[tensor]
        return all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    batch = 1 if name.endswith("_large") else 4
    side = module.MAX_REGION_SIDE if name.endswith("_large") else 1088
    if names.FRAME in inputs:
        assert covers(names.FRAME, 1, 1, 1, 3)
        assert covers(names.FRAME, 1, 2160, 3840, 3)
        assert covers(names.FRAME, 1, module.MAX_REGION_SIDE, module.MAX_FRAME_SIDE, 3)
    elif names.PATCH in inputs:
        for h, w in ((1, 1), (side, side), (1, side)):
            assert covers(names.PATCH, 1, h, w, 3)
        assert covers(names.CROP, batch, 512, 512, 3) and covers(names.CROP, 1, side, side, 3)
    else:
        for given, wanted in ((512, 256), (512, 2048), (2048, 512), (1, 1)):
            assert covers(names.CROP, 4, given, given, 3) and covers(names.WEIGHTS, wanted, given)


def test_options_of_networks_that_do_not_fit_the_graphs_are_left_out() -> None:
    graphs = BackendConfig("cuda", provider_options={"gpu_mem_limit": "9", "enable_cuda_graph": "1"})
    assert dict(graph_options(graphs, names.PASTE_STILL).provider_options) == {"gpu_mem_limit": "9"}
    other = graph_options(
        BackendConfig("ort-tensorrt", provider_options={"trt_fp16_enable": "1"}), names.PASTE_STILL
    )
    assert (other.backend, dict(other.provider_options)) == ("cuda", {})
    assert graph_options(CPU, names.PASTE_STILL) == CPU
    for wrong in ("", "crop", "crop_512_large", "../names"):
        with pytest.raises(EngineError, match="paste_still"):
            graph_options(CPU, wrong)


def test_every_graph_has_its_file() -> None:
    assert (
        {graph_file(name).stem for name in GRAPHS}
        == {name.removesuffix("_large") for name in GRAPHS}
        == {path.stem for path in graph_file(names.CUT_REGION).parent.glob("*.onnx")}
    )


# -- the end -----------------------------------------------------------------------------------------------------


def test_close_closes_what_was_opened_and_nothing_runs_afterwards() -> None:
    log: list[str] = []
    pixels = resident(log)
    frame = noise(50, 50, 3)
    place = pixels.place(pixels.frame(frame), to_frame(0.5, 0, 25, 25, 32), 32)
    pixels.close()
    pixels.close()
    assert [line for line in log if line.startswith("close")] == ["close cut_region"]
    for call in (lambda: pixels.frame(noise(9, 9, 3)), lambda: place.draw(noise(1, 32, 32, 3))):
        with pytest.raises(EngineError, match="after close"):
            call()


def test_a_graph_that_cannot_be_opened_says_so_each_time() -> None:
    def fail(name: str) -> Runner:
        raise EngineError(f"no {name}", "", "")

    with DevicePixels(fail) as pixels:
        for _ in range(2):
            with pytest.raises(EngineError, match="no cut_region"):
                pixels.frame(noise(9, 9, 3))


def test_several_threads_share_one_graph_and_one_download() -> None:
    log: list[str] = []
    frame, matrix = noise(80, 90, 3), to_frame(0.8, 10, 45, 40, 64)
    crops = noise(8, 64, 64, 3)
    failed: list[BaseException] = []
    with resident(log) as pixels:
        wanted = pasted(pixels.place(frame, matrix, 64), frame, crops)
        drawn = pixels.place(frame, matrix, 64).draw(crops)

        def work(index: int, one: Drawn) -> None:
            try:
                out = frame.copy()
                one.write(out)
                assert apart(out, wanted[index]) == 0
                assert apart(pasted(pixels.place(frame, matrix, 64), frame, crops[:1])[0], wanted[0]) == 0
            except BaseException as error:  # noqa: BLE001 - raised below
                failed.append(error)

        threads = [threading.Thread(target=work, args=item) for item in enumerate(drawn)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failed
    assert log.count(f"close {names.PASTE_STILL}") == 1


def test_a_face_can_be_written_more_than_once() -> None:
    frame = noise(50, 60, 3)
    with resident([]) as pixels:
        [drawn] = pixels.place(frame, to_frame(0.5, 0, 30, 25, 32), 32).draw(noise(1, 32, 32, 3))
        first, second = frame.copy(), frame.copy()
        drawn.write(first)
        first[:] = 0
        drawn.write(second)
        assert (second != 0).any()


@pytest.mark.parametrize("moving", [False, True])
def test_what_a_place_keeps_is_found_by_who_adds_it_up(device: DevicePixels, moving: bool) -> None:
    """Prepared portraits count against a server's limit, with the pixels and weights below the face."""
    frame = noise(300, 400, 3)
    where = to_frame(0.4, 10, 190, 150, 512)
    x0, y0, x1, y1 = HOST.place(frame, where, 512).rect
    area = (x1 - x0) * (y1 - y0)
    assert memory_of(HOST.place(frame, where, 512)) >= area
    place = device.place(device.frame(frame) if moving else frame, where, 512)
    assert memory_of(place) >= 3 * area + (512 * 512 if moving else area)


def test_while_one_graph_is_opened_the_others_are_used_and_it_is_opened_once() -> None:
    """TensorRT may compile for a minute; streams whose graphs are there must not stand still meanwhile."""
    begun, go, opened = threading.Event(), threading.Event(), []

    def open_graph(name: str) -> Runner:
        opened.append(name)
        if name == names.RESIZE_CROPS:
            begun.set()
            assert go.wait(30)
        return open_device_graph(name, CPU)

    frame, crops = noise(200, 240, 3), noise(1, 96, 96, 3)
    matrix = to_frame(0.5, 15, 120, 100, 96)
    with DevicePixels(open_graph) as pixels:
        place = pixels.place(frame, matrix, 96)
        wanted = pasted(place, frame, crops)
        resized: list[Array] = []
        threads = [
            threading.Thread(target=lambda: resized.append(pixels.resize(crops, 64))) for _ in range(2)
        ]
        try:
            for thread in threads:
                thread.start()
            assert begun.wait(30)
            assert apart(pasted(place, frame, crops)[0], wanted[0]) == 0
            assert pixels.place(frame, matrix, 96).rect == place.rect
            assert pixels.frame(frame) is pixels.frame(frame)
        finally:
            go.set()
            for thread in threads:
                thread.join()
        assert [tuple(array.shape) for array in resized] == [(1, 64, 64, 3)] * 2
    assert sorted(opened) == sorted([names.PASTE_STILL, names.RESIZE_CROPS])
    with pytest.raises(EngineError, match="after close"):
        pixels.resize(crops, 32)
