"""Device pixels on TensorRT engines, on a fake TensorRT and a fake CUDA device of every generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx")

from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.cuda import open_cuda
from lp_edge.engines.runner import Runner
from lp_edge.engines.tensorrt import open_engine
from lp_edge.engines.trt_build import TensorRtConfig
from lp_edge.runtime.pixels import DevicePixels, HostPixels, graph_file, graph_options
from lp_edge.tests.fake_cuda.device import H200, ORIN, FakeCuda
from lp_edge.tests.fake_tensorrt.module import VERSIONS, World, make_tensorrt
from lp_edge.tests.runtime.test_pixels import apart, inside, noise, pasted, to_frame

pytestmark = pytest.mark.skipif(
    int(cv2.__version__.partition(".")[0]) < 5, reason="OpenCV 4 rounds positions to 1/32 pixel"
)
HOST = HostPixels()


@pytest.fixture(params=[*VERSIONS, "jetson"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[DevicePixels, World]]:
    """Pixels on a device, and the TensorRT that they run on; at the end nothing may be left and nothing done wrong."""
    device, version = (ORIN, "10.3") if request.param == "jetson" else (H200, request.param)
    world = World(FakeCuda(device))
    trt, cuda = make_tensorrt(version, world), open_cuda(runtime=world.cuda)

    def open_graph(name: str) -> Runner:
        options = graph_options(BackendConfig("tensorrt"), name).provider_options
        config = TensorRtConfig.from_options(options)
        return open_engine(graph_file(name), cuda=cuda, trt=trt, cache_dir=tmp_path, name=name, config=config)

    with DevicePixels(open_graph) as pixels:
        yield pixels, world  # type: ignore[misc]
    cuda.close()
    world.verify()


def test_one_engine_of_a_graph_serves_all_sizes(machine: tuple[DevicePixels, World]) -> None:
    pixels, world = machine
    crops = noise(6, 96, 96, 3)  # more than an engine takes at once
    for height, width in ((150, 201), (80, 333), (90, 64)):
        frame = noise(height, width, 3)
        matrix = to_frame(0.5, 15, width / 2, height / 2, 128)
        kept = pixels.frame(frame)
        to_crop = np.linalg.inv(to_frame(0.2, 15, width / 2, height / 2, 512))
        assert apart(pixels.crop(kept, to_crop, reduce=2), HOST.crop(frame, to_crop, reduce=2)) <= 1
        here = HOST.place(frame, matrix, 128)
        wanted = pasted(here, frame, crops)
        for source in (frame, kept):
            place = pixels.place(source, matrix, 128)
            assert inside(here.rect, place.rect)
            got = pasted(place, frame, crops)
            assert max(apart(a, b) for a, b in zip(got, wanted, strict=True)) <= 1
            again = pasted(place, frame, crops[:2], blend_on_host=True)
            assert all((a == b).all() for a, b in zip(again, wanted, strict=False))
        rect = (3, 5, 60, 70)
        for source in (frame, kept):
            got = pasted(pixels.rect_place(source, rect), frame, crops[:, :40, :50])
            wanted_rect = pasted(HOST.rect_place(frame, rect), frame, crops[:, :40, :50])
            assert max(apart(a, b) for a, b in zip(got, wanted_rect, strict=True)) <= 1
    assert len(world.builds) == 6  # crop, cut, resize and three that paste


def test_a_large_region_has_an_engine_of_its_own(machine: tuple[DevicePixels, World]) -> None:
    pixels, world = machine
    frame, crops = noise(20, 1300, 3), noise(2, 64, 64, 3)
    matrix = np.array([[22.0, 0, -60], [0, 0.4, -2], [0, 0, 1.0]])
    got = pasted(pixels.place(frame, matrix, 64), frame, crops)
    wanted = pasted(HOST.place(frame, matrix, 64), frame, crops)
    assert max(apart(a, b) for a, b in zip(got, wanted, strict=True)) <= 1
    assert len(world.builds) == 1  # the one for smaller regions was not needed
