"""The device graphs against their OpenCV/NumPy twins, at random and where it is most likely to go wrong.

The random cases are those of benchmarks/device_graphs.py, which runs more of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")

import lp_edge
from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.runner import to_host
from lp_edge.errors import ConfigError, OutputError
from lp_edge.export import device_graphs as graphs
from lp_edge.export.cost import Cost, _sized, cost
from lp_edge.export.lint import lint
from lp_edge.export.onnx_export import serialise
from lp_edge.export.opset import opset_of
from lp_edge.runtime.crop import cut
from lp_edge.runtime.device_inputs import paste_matrix, resize_weights, sampling_matrix
from lp_edge.runtime.paste_back import PastePlan, crop_mask, paste_back, soft_mask

SCRIPT = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "device_graphs.py"
STEPPED = int(cv2.__version__.partition(".")[0]) < 5
warps = pytest.mark.skipif(STEPPED, reason="OpenCV 4 rounds positions to 1/32 pixel")


def load() -> ModuleType:
    if not SCRIPT.is_file():
        pytest.skip("no source tree: benchmarks are not installed")
    spec = importlib.util.spec_from_file_location("device_graphs_under_test", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    module = load()
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def operations(bench: ModuleType) -> Any:
    """As the benchmark has them, for small crops."""
    return bench.operations(crop=96)


@pytest.fixture(scope="module")
def built(operations: Any) -> Callable[..., Any]:
    return functools.cache(lambda name, flavor="main": operations[name].graph(flavor=flavor))


def run(model: Any, **feeds: np.ndarray) -> np.ndarray:
    with open_runner(serialise(model), BackendConfig("cpu", threads=1), name="device") as runner:
        return to_host(runner.infer(feeds)[names.IMAGE])


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape and one.dtype == other.dtype == np.uint8
    return int(np.abs(one.astype(np.int16) - other).max(initial=0))


def turned(scale: float, degrees: float, x: float, y: float, size: int) -> np.ndarray:
    """Frame px -> crop px, (x, y) in the crop's middle."""
    c, s = (scale * turn(np.deg2rad(degrees)) for turn in (np.cos, np.sin))
    return np.array([[c, s, size / 2 - c * x - s * y], [-s, c, size / 2 + s * x - c * y], [0, 0, 1.0]])


# -- all graphs --------------------------------------------------------------------------------------------

NAMES = (
    "crop",
    "crop_halved",
    "resize_512_to_256",
    "resize_512_to_128",
    "resize_512_to_300",
    "resize_512_to_1024",
    "cut",
    "paste",
    "paste_mask",
    "rect_paste",
)


def test_every_operation_of_the_benchmark_is_tested(bench: ModuleType) -> None:
    assert tuple(bench.OPERATIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_twin_within_one_level(bench: ModuleType, operations: Any, built: Any, name: str) -> None:
    if STEPPED and operations[name].warps:
        pytest.skip("OpenCV 4 rounds positions to 1/32 pixel")
    found = bench.parity(operations[name], built(name), 12, seed=7)
    assert found.values > 10_000
    assert found.worst <= 1
    assert found.unequal / found.values < 0.01  # where a value is all but a half


@pytest.mark.parametrize("name", NAMES)
def test_both_flavours_suit_their_targets_and_are_alike(built: Any, name: str) -> None:
    models = {flavor: built(name, flavor) for flavor in graphs.OPSETS}
    for flavor, model in models.items():
        assert lint(model, flavor) == []
        assert opset_of(model) == graphs.OPSETS[flavor]
        assert "GridSample" not in {node.op_type for node in model.graph.node}
    main, older = (serialise(onnx.ModelProto(graph=model.graph)) for model in models.values())
    assert main == older


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_has_five_axes_and_no_size_depends_on_values(
    operations: Any, built: Any, name: str
) -> None:
    case = operations[name].draw(np.random.default_rng(1))
    folded = _sized(built(name), {key: array.shape for key, array in case.feeds.items()}, None)
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in folded.graph.value_info
    }
    inner = {output for node in folded.graph.node for output in node.output} - {names.IMAGE}
    assert inner <= sizes.keys()
    assert max(map(len, sizes.values())) <= 4
    assert all(min(dims, default=1) > 0 for dims in sizes.values())


def test_the_same_graph_has_the_same_bytes() -> None:
    assert serialise(graphs.crop_graph(64)) == serialise(graphs.crop_graph(64))


def test_the_graphs_of_the_package_are_those_that_are_made_now() -> None:
    folder = Path(lp_edge.__file__).resolve().parent / "runtime" / "device_graphs"
    made = graphs.shipped()
    assert {path.stem for path in folder.iterdir() if path.suffix == ".onnx"} == made.keys()
    for name, model in made.items():
        data = (folder / f"{name}.onnx").read_bytes()
        there = onnx.load_from_string(data)
        # The header names the version of PyTorch.
        assert serialise(onnx.ModelProto(graph=there.graph)) == serialise(onnx.ModelProto(graph=model.graph))
        assert opset_of(there) == 16 and len(data) < 20_000
        assert lint(there, "tensorrt8") == [] and lint(there, "main") == []


def test_the_command_writes_the_graphs_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_SHIPPED", {"cut_region": graphs.cut_graph})
    assert graphs.main([str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cut_region.onnx"]
    with pytest.raises(OutputError):
        graphs.main([str(tmp_path / "nowhere")])


def test_columns_of_lines_are_a_rectangle() -> None:
    frame = noise(2, 20, 30, 3)
    image = run(graphs.cut_graph(), frame=frame[:, 3:9], columns=np.arange(7, 30, dtype=np.float32))
    assert np.array_equal(image, frame[:, 3:9, 7:30])


# -- crops -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crop64() -> Any:
    return graphs.crop_graph(64)


@warps
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (3, 5), (63, 65)])
@pytest.mark.parametrize("scale", [0.1, 0.9, 4.0])
def test_tiny_frames(crop64: Any, size: tuple[int, int], scale: float) -> None:
    frame = noise(*size, 3)
    maps = [
        turned(scale, degrees, size[1] / 2 + off, size[0] / 2 - off, 64)
        for degrees in (0, 90, 33)
        for off in (0, 0.7)
    ]
    matrix = np.concatenate([sampling_matrix(m) for m in maps])
    expected = np.stack([cut(frame, m, size=64).image for m in maps])
    assert expected.any()
    assert apart(run(crop64, frame=frame[None], matrix=matrix), expected) <= 1


def test_a_shift_by_whole_pixels_copies_them(crop64: Any) -> None:
    frame = noise(1, 100, 90, 3)
    image = run(crop64, frame=frame, matrix=np.array([[[1, 0, 60], [0, 1, -7]]], np.float32))
    expected = np.zeros((1, 64, 64, 3), np.uint8)
    expected[:, 7:, :30] = frame[:, :57, 60:]
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("far", [-1e6, -101.0, 101.0, 1e6])
def test_a_crop_beyond_the_frame_is_black(crop64: Any, far: float) -> None:
    frame = np.full((1, 37, 100, 3), 255, np.uint8)
    for matrix in ([[1, 0, far], [0, 1, 0]], [[1, 0, 0], [0, 1, far]]):
        assert not run(crop64, frame=frame, matrix=np.array([matrix], np.float32)).any()


def test_half_a_pixel_beyond_the_border_is_half_as_bright(crop64: Any) -> None:
    frame = np.full((1, 8, 8, 3), 200, np.uint8)
    image = run(crop64, frame=frame, matrix=np.array([[[1, 0, -0.5], [0, 1, -0.5]]], np.float32))
    assert [int(image[0, i, i, 0]) for i in (0, 1, 8, 9)] == [50, 200, 50, 0]
    assert [int(image[0, 0, i, 0]) for i in (0, 1, 8, 9)] == [50, 100, 50, 0]


@warps
def test_positions_hold_in_the_far_corner_of_a_large_frame(crop64: Any) -> None:
    frame = noise(2160, 3840, 3) // 128 * 255  # black and white: 1/32 pixel would be 8 levels
    maps = [turned(scale, degrees, 3820, 2140, 64) for scale, degrees in ((1.37, 11), (0.31, -77), (4, 0))]
    matrix = np.concatenate([sampling_matrix(m) for m in maps])
    expected = np.stack([cut(frame, m, size=64).image for m in maps])
    assert apart(run(crop64, frame=frame[None], matrix=matrix), expected) <= 1


def test_one_frame_for_all_crops_or_one_for_each(crop64: Any) -> None:
    frames = noise(3, 50, 70, 3)
    matrix = np.concatenate([sampling_matrix(turned(1.7, d, 30, 20, 64)) for d in (5, 50, 95)])
    each = run(crop64, frame=frames, matrix=matrix)
    for i in range(3):
        alone = run(crop64, frame=frames[i : i + 1], matrix=matrix)
        assert np.array_equal(alone[i], each[i])
    assert not np.array_equal(each[0], each[1])


def test_rows_of_a_frame_are_a_frame(crop64: Any) -> None:
    frame = noise(1, 300, 80, 3)
    to_crop = turned(1.0, 20, 40, 150, 64)
    moved = to_crop @ np.array([[1, 0, 0], [0, 1, 90], [0, 0, 1.0]])
    whole = run(crop64, frame=frame, matrix=sampling_matrix(to_crop))
    part = run(crop64, frame=frame[:, 90:210], matrix=sampling_matrix(moved))
    assert apart(whole, part) <= 1 and whole.any()


# -- resizing ----------------------------------------------------------------------------------------------


def test_lanczos_clips_where_it_overshoots() -> None:
    crop = np.zeros((1, 16, 16, 3), np.uint8)
    crop[:, :, 8:] = 255
    image = run(graphs.resize_graph(), crop=crop, weights=resize_weights(16, 40))
    expected = cv2.resize(crop[0], (40, 40), interpolation=cv2.INTER_LANCZOS4)
    assert apart(image[0], expected) == 0 and set(image[0, 0, :10, 0]) == {0} and image.max() == 255


# -- pasting -----------------------------------------------------------------------------------------------


def test_the_blend_is_exact_for_all_pairs_of_pixels() -> None:
    above, below = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    weights = np.array([0, 1, 2, 64, 127, 128, 200, 253, 254, 255], np.uint8)
    image = run(
        graphs.paste_graph(),
        patch=np.repeat(below[None, ..., None], 3, 3),
        crop=np.repeat(above[None, ..., None], 3, 3),
        matrix=np.repeat(np.array([[[1, 0, 0], [0, 1, 0]]], np.float32), len(weights), 0),
        weight=np.broadcast_to(weights[:, None, None, None], (len(weights), 256, 256, 1)).copy(),
    )
    w = weights.astype(np.int64)[:, None, None]
    expected = (above * w + below * (255 - w)) // 255
    assert np.array_equal(image, np.repeat(expected[..., None], 3, 3).astype(np.uint8))


@warps
def test_a_patch_may_be_whole_rows_of_the_frame() -> None:
    frame, crops = noise(90, 160, 3), noise(2, 64, 64, 3, seed=1)
    to_frame = np.linalg.inv(turned(1.3, 25, 70, 50, 64))
    plan = PastePlan.prepare(to_frame, (160, 90), 64)
    x0, y0, x1, y1 = plan.rect
    weight = np.zeros((1, y1 - y0, 160, 1), np.uint8)
    weight[0, :, x0:x1, 0] = plan.weight
    rows = frame[None, y0:y1]
    assert np.shares_memory(rows, frame)
    image = run(
        graphs.paste_graph(),
        patch=rows,
        crop=crops,
        matrix=paste_matrix(to_frame, (0, y0)),
        weight=weight,
    )
    for out, crop in zip(image, crops, strict=True):
        assert apart(out, plan.paste(frame, crop)[y0:y1]) <= 1
    assert np.array_equal(image[:, :, :x0], np.broadcast_to(rows[:, :, :x0], image[:, :, :x0].shape))


@warps
def test_a_moving_source_has_a_patch_and_a_matrix_for_each_crop() -> None:
    frames, crops = noise(3, 80, 80, 3), noise(3, 64, 64, 3, seed=1)
    maps = [np.linalg.inv(turned(1.1, d, 40 + d / 10, 38, 64)) for d in (0, 15, 30)]
    plans = [PastePlan.prepare(m, (80, 80), 64) for m in maps]
    x0, y0 = (min(p.rect[i] for p in plans) for i in (0, 1))
    x1, y1 = (max(p.rect[i] for p in plans) for i in (2, 3))
    image = run(
        graphs.paste_graph(warp_mask=True),
        patch=np.ascontiguousarray(frames[:, y0:y1, x0:x1]),
        crop=crops,
        matrix=np.concatenate([paste_matrix(m, (x0, y0)) for m in maps]),
        mask=crop_mask(64)[None, ..., None],
    )
    for out, plan, frame, crop in zip(image, plans, frames, crops, strict=True):
        assert apart(out, plan.paste(frame, crop)[y0:y1, x0:x1]) <= 1


def test_a_rectangle_at_its_own_size_is_copied_by_full_weights() -> None:
    crop = noise(1, 33, 47, 3)
    image = run(
        graphs.rect_paste_graph(),
        patch=noise(1, 33, 47, 3, seed=1),
        crop=crop,
        weight=np.full((1, 33, 47, 1), 255, np.uint8),
    )
    assert np.array_equal(image, crop)


def test_a_rectangle_from_very_few_pixels() -> None:
    frame = noise(60, 70, 3)
    model = graphs.rect_paste_graph()
    for size in ((1, 1), (2, 5), (3, 40)):
        crop = noise(*size, 3, seed=2)
        image = run(model, patch=frame[None], crop=crop[None], weight=soft_mask(60, 70)[None])
        assert apart(image[0], paste_back(frame, crop, (0, 0, 70, 60))) <= 1


# -- costs -------------------------------------------------------------------------------------------------


def test_costs_equal_a_count_by_hand() -> None:
    given, between, wanted, weights = 512 * 512 * 3, 256 * 512 * 3, 256 * 256 * 3, 256 * 512
    found = cost(graphs.resize_graph(), {"crop": (1, 512, 512, 3), "weights": (256, 512)})
    assert found.boundary_bytes == given + 4 * weights + wanted
    # rows, columns; then an addition, a floor, a clip
    assert found.flops == 2 * 512 * between + 2 * 512 * wanted + 3 * wanted
    # float32 between cast, transpositions (of the crop, of the weights, of the result) and products; the second product
    # is one kernel with addition, floor and clip behind it, which alone read what the one before has written
    constants = 3 * 4  # half, bounds
    assert (
        found.fused_bytes
        == given + 4 * (4 * given + 4 * weights + 2 * between + 4 * wanted) + wanted + constants
    )
    assert found.node_bytes == found.fused_bytes + 3 * 4 * 2 * wanted

    found = cost(graphs.resize_graph(), {"crop": (2, 512, 512, 3), "weights": (1024, 512)})
    products = 2 * 2 * 3 * (1024 * 512 * 512 + 1024 * 512 * 1024)
    assert products < found.flops < 1.01 * products


def test_costs_grow_with_the_region_not_with_the_frame() -> None:
    model = graphs.paste_graph()

    def of(height: int, width: int) -> Cost:
        return cost(
            model,
            {
                "patch": (1, height, width, 3),
                "crop": (1, 64, 64, 3),
                "matrix": (1, 2, 3),
                "weight": (1, height, width, 1),
            },
        )

    small, large = of(100, 100), of(200, 200)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.02)
    assert small.boundary_bytes < small.fused_bytes < small.node_bytes


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: graphs.crop_graph(0), "size is 0"),
        (lambda: graphs.crop_graph(64, reduce=3), "divisor of 64"),
        (lambda: graphs.crop_graph(64, reduce=0), "divisor of 64"),
        (lambda: graphs.crop_graph(64, flavor="tensorrt7"), "main or tensorrt8"),  # type: ignore[arg-type]
        (lambda: graphs.resize_graph(flavor="tensorrt7"), "main or tensorrt8"),  # type: ignore[arg-type]
        (lambda: resize_weights(64, 0), "64 to 0 px"),
        (lambda: sampling_matrix(np.zeros((2, 3))), "inverse"),
        (lambda: sampling_matrix(np.eye(2)), "finite"),
        (lambda: sampling_matrix(np.full((3, 3), np.nan)), "finite"),
        (lambda: paste_matrix(np.eye(4), (0, 0)), "finite"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()


# -- the benchmark -----------------------------------------------------------------------------------------


def test_the_benchmark_prints_json_lines(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    threads = cv2.getNumThreads()
    try:
        code = bench.main(["--only", "resize_512_to_256", "--cases", "1", "--repeat", "1", "--frame", "720p"])
    finally:
        cv2.setNumThreads(threads)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert [row["benchmark"] for row in rows] == ["parity", "parity", "time", "cost"]
    assert rows[0]["max"] == 0 and rows[2]["twin_ms"] > 0 and rows[3]["boundary_mb"] == 1.507
    assert all("versions" in row["provenance"] for row in rows)


def test_the_benchmark_fails_when_a_graph_is_off(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = bench.OPERATIONS["resize_512_to_256"]

    def wrong(rng: np.random.Generator) -> Any:
        case = operation.draw(rng)
        return bench.Case(case.feeds, lambda: case.twin() ^ 2)

    changed = dataclasses.replace(operation, draw=wrong)
    monkeypatch.setitem(bench.OPERATIONS, "resize_512_to_256", changed)
    assert bench.main(["parity", "--only", "resize_512_to_256", "--cases", "1"]) == 1
