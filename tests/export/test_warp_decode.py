from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra (torch) is not installed")
pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")

import onnxruntime as ort

from lp_edge.engines import names
from lp_edge.errors import ConfigError
from lp_edge.export.liveportrait import warp_decode
from lp_edge.export.liveportrait.warp_decode import (
    DepthConv,
    InstanceNorm,
    ParityConv,
    PhaseConv,
    PlanarConv,
    Reductions,
    SparseMotions,
    VolumeWarp,
    WarpDecode,
)
from lp_edge.export.networks import SpadeGenerator, WarpingNetwork
from lp_edge.export.onnx_export import export_onnx, serialise

F = torch.nn.functional
FAR = 3.0  # keypoints and positions reach well outside -1..1


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(5)
    with torch.no_grad():
        yield


def uniform(*shape: int, reach: float = 1.0) -> torch.Tensor:
    return (torch.rand(*shape) * 2 - 1) * reach


def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# -- single reductions against their plain form -----------------------------------------------------


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("depth", [0, 3])
def test_phases_equal_a_convolution_of_the_enlarged_map(factor: int, depth: int) -> None:
    deep = (depth,) if depth else ()
    weight, bias = uniform(5, 4, *([3] if depth else []), 3, 3), uniform(5)
    x = uniform(2, 4, *deep, 6, 7)
    scale = (1.0,) * len(deep) + (float(factor),) * 2
    convolve = F.conv3d if depth else F.conv2d
    want = convolve(F.interpolate(x, scale_factor=scale, mode="nearest"), weight, bias, padding=1)
    got = PhaseConv(weight, bias, factor, (6, 7), depth or 1)(x)
    assert gap(got, want) < 1e-5


def test_phases_need_fewer_products() -> None:
    weight, bias = uniform(1, 1, 3, 3), uniform(1)
    taps = {
        f: sum(p.numel() for p in PhaseConv(weight, bias, f, (4, 4)).parameters() if p.dim() > 1)
        for f in (2, 4)
    }
    assert taps == {2: 16, 4: 25}


@pytest.mark.parametrize("depth", [2, 5, 9])
@pytest.mark.parametrize("kernel", [3, 7])
def test_planar_convolution_equals_the_3d_one(depth: int, kernel: int) -> None:
    weight, bias = uniform(4, 3, kernel, kernel, kernel), uniform(4)
    x = uniform(2, 3, depth, 8, 6)
    want = F.conv3d(x, weight, bias, padding=kernel // 2)
    slices = x.transpose(1, 2).flatten(0, 1)
    got = PlanarConv(weight, bias, (depth, 8, 6))(slices).reshape(2, depth, 4, 8, 6).transpose(1, 2)
    assert gap(got, want) < 1e-4  # of sums of up to a thousand products


@pytest.mark.parametrize("depth", [2, 4, 10])
@pytest.mark.parametrize("kernel", [3, 7, 11])
def test_convolution_by_parity_equals_the_3d_one(depth: int, kernel: int) -> None:
    weight, bias = uniform(4, 3, kernel, kernel, kernel), uniform(4)
    x = uniform(2, 3, depth, 8, 6)
    want = F.conv3d(x, weight, bias, padding=kernel // 2)
    slices = x.transpose(1, 2).flatten(0, 1)
    got = ParityConv(weight, bias, (depth, 8, 6))(slices).reshape(2, depth, 4, 8, 6).transpose(1, 2)
    assert gap(got, want) < 1e-5 * kernel**3


@pytest.mark.parametrize("depth", [2, 4, 10])
def test_depth_convolution_equals_the_3d_one(depth: int) -> None:
    weight, bias = uniform(6, 5, 3, 3, 3), uniform(6)
    x = uniform(2, 5, depth, 8, 7)
    slices = x.transpose(1, 2).flatten(0, 1)
    got = DepthConv(weight, bias, (depth, 8, 7))(slices).reshape(2, depth, 6, 8, 7).transpose(1, 2)
    assert gap(got, F.conv3d(x, weight, bias, padding=1)) < 2e-5


@pytest.mark.parametrize("reach", [0.2, FAR])
@pytest.mark.parametrize("sources", [1, 2])
def test_hat_matrices_equal_5d_grid_sample(reach: float, sources: int) -> None:
    size = (5, 8, 6)
    volume, shift = uniform(sources, 4, *size), uniform(2, 22, 3, reach=reach)
    shift[:, 0] = 0
    axes = [torch.linspace(-1, 1, n) for n in size]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack((x, y, z), -1) + shift[:, :, None, None, None]
    want = torch.stack(
        [
            F.grid_sample(
                volume[n % sources].expand(22, -1, -1, -1, -1), grid[n], align_corners=False
            ).flatten(0, 1)
            for n in range(2)
        ]
    )
    assert gap(SparseMotions(21, size).features(volume, shift), want) < 1e-5


def test_heat_maps_are_gaussians_and_padding_is_zero() -> None:
    size = (4, 7, 6)
    kp_s, kp_d = uniform(2, 21, 3), uniform(2, 21, 3, reach=FAR)
    axes = [torch.linspace(-1, 1, n) for n in size]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack((x, y, z), -1)

    def bell(kp: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * ((grid - kp[:, :, None, None, None]) ** 2).sum(-1) / 0.01)

    got = SparseMotions(24, size).heat(kp_s, kp_d)
    assert gap(got[:, :21], bell(kp_d) - bell(kp_s)) < 1e-6
    assert got.shape[1] == 24 and not got[:, 21:].any()


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize("reach", [1.0, FAR, 1e6])
def test_volume_warp_equals_5d_grid_sample(gather: bool, sources: int, reach: float) -> None:
    size = (4, 5, 9, 8)
    volume, grid = uniform(sources, *size), uniform(3, 3, 6, 7, 3, reach=reach)
    # exactly on centres, edges and one cell outside, where an off-by-one would show
    grid[0, 0, 0] = torch.tensor([-1.0, 1.0, -1 + 1 / 5, 1 - 1 / 9, 1 + 1 / 8, 0.0, -1 - 1 / 5])[:, None]
    want = F.grid_sample(volume.expand(3, -1, -1, -1, -1), grid, align_corners=False).flatten(2)
    got = VolumeWarp(gather, size)(volume, grid)
    assert gap(got, want) < (2e-6 if gather else 5e-5)


@pytest.mark.parametrize("gather", [False, True])
def test_volume_warp_exports_with_any_batch_and_without_rank_5(gather: bool) -> None:
    size = (4, 5, 9, 8)
    model = export_onnx(
        VolumeWarp(gather, size),
        {"volume": uniform(2, *size), "grid": uniform(2, 3, 6, 7, 3)},
        {"out": ("batch", 4, 126)},
        {"volume": {0: "sources"}, "grid": {0: "batch"}},
        16,
    )
    assert ("GridSample" in {n.op_type for n in model.graph.node}) == (not gather)
    runner = session(serialise(model))
    for sources, frames in ((1, 3), (3, 3), (1, 1)):
        volume, grid = uniform(sources, *size), uniform(frames, 3, 6, 7, 3, reach=1.5)
        want = F.grid_sample(volume.expand(frames, -1, -1, -1, -1), grid, align_corners=False).flatten(2)
        (got,) = runner.run(None, {"volume": volume.numpy(), "grid": grid.numpy()})
        assert gap(torch.from_numpy(got), want) < 5e-5


@pytest.mark.parametrize("decomposed", [False, True])
def test_instance_norm_keeps_statistics_in_float32(decomposed: bool) -> None:
    norm = InstanceNorm(3, decomposed)
    x = uniform(2, 3, 40, 40, reach=5.0)
    assert gap(norm(x), F.instance_norm(x)) < 1e-5
    large = (x * 8000).half()  # its squares overflow float16
    out = norm(large)
    assert out.dtype == torch.float16 and gap(out.float(), F.instance_norm(large.float())) < 2e-3
    model = export_onnx(norm, {"x": x}, {"y": ("batch", 3, 40, 40)}, {"x": {0: "batch"}}, 16)
    kinds = {n.op_type for n in model.graph.node}
    assert ("InstanceNormalization" in kinds) == (not decomposed)
    (got,) = session(serialise(model)).run(None, {"x": x.numpy()})
    assert gap(torch.from_numpy(got), F.instance_norm(x)) < 1e-5


@pytest.fixture(scope="module")
def generator() -> SpadeGenerator:
    torch.manual_seed(3)
    return SpadeGenerator().eval()


BLOCK_SWITCHES = (
    "merge_shared",
    "merge_gamma_beta",
    "phases_2x",
    "phases_4x",
    "fold_shortcut",
    "normalise_small",
    "channel_groups",
    "keep_blocked",
    "ordered",
)


@pytest.mark.parametrize("name, factor, width", [("G_middle_0", 1, 512), ("up_0", 2, 512), ("up_1", 4, 256)])
@pytest.mark.parametrize("on", [False, True])
def test_spade_blocks_equal_the_network(
    generator: SpadeGenerator, monkeypatch: pytest.MonkeyPatch, name: str, factor: int, width: int, on: bool
) -> None:
    side = 6
    monkeypatch.setattr(warp_decode, "_SIDE", side)
    reductions = Reductions(**dict.fromkeys(BLOCK_SWITCHES, on))
    block = warp_decode._Block(generator.state_dict(), name, factor, reductions, on)
    small = side * max(1, factor // 2)
    x, condition = uniform(2, width, small, small), uniform(2, 256, side, side)
    enlarged = x if factor == 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")
    want = generator.get_submodule(name)(enlarged, condition)
    assert gap(block(x, condition), want) < 1e-4 * float(want.abs().max())


DENSE_SWITCHES = ("planar_mask", "pad_channels", "split_occlusion", "volume_phases", "fast_depth")


@pytest.mark.parametrize("on", [False, True])
def test_dense_motion_equals_the_network(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr(warp_decode, "_SIDE", 32)
    network = WarpingNetwork().eval().dense_motion_network
    for module in network.modules():  # a fresh batch norm does nothing, so that a wrong fold would not show
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
            for tensor in (module.weight, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.uniform_(-0.2, 0.2)
    network.mask.weight.mul_(20)
    motion = warp_decode.DenseMotion(
        network.state_dict(), Reductions(**dict.fromkeys(DENSE_SWITCHES, on)), torch.float32
    )
    feature = uniform(1, 32, 16, 32, 32)
    kp_s, kp_d = uniform(1, 21, 3, reach=0.5), uniform(1, 21, 3, reach=1.5)
    want = network(feature, kp_s, kp_d)
    compressed = F.relu(network.norm(network.compress(feature)))
    deformation, occlusion = motion(compressed, kp_s, kp_d)
    assert gap(deformation, want[names.DEFORMATION]) < 1e-5
    assert gap(occlusion, want[names.OCCLUSION_MAP]) < 1e-5
    still = torch.stack(
        torch.meshgrid(*[torch.linspace(-1, 1, n) for n in (16, 32, 32)], indexing="ij"), -1
    ).flip(-1)
    assert gap(deformation[0], still) > 0.01  # something moves


def test_switches_are_all_tried() -> None:
    assert {f.name for f in dataclasses.fields(Reductions)} == {*BLOCK_SWITCHES, *DENSE_SWITCHES, "gather"}


def test_unknown_flavour_is_refused(generator: SpadeGenerator) -> None:
    with pytest.raises(ConfigError, match="tensorrt8"):
        WarpDecode(WarpingNetwork(), generator, flavor="tensorrt7")  # type: ignore[arg-type]


# -- the whole at full size -------------------------------------------------------------------------


def test_graph_draws_the_golden_picture(shared: Path, tmp_path: Path) -> None:
    """An input of the golden file through ONNX Runtime, from the synthetic checkpoints; the export tries batches."""
    import importlib.util
    import json

    folder = shared / "liveportrait"
    spec = importlib.util.spec_from_file_location("make_checkpoints", folder / "make_checkpoints.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    tables = json.loads((folder / "state_dicts.json").read_text())

    def load(module: torch.nn.Module, file: str) -> torch.nn.Module:
        module.load_state_dict(maker.fill(file, tables[file]))
        return module.eval()

    from lp_edge.export.networks import AppearanceFeatureExtractor

    warping = load(WarpingNetwork(), "base_models/warping_module.pth")
    generator = load(SpadeGenerator(), "base_models/spade_generator.pth")
    appearance = load(AppearanceFeatureExtractor(), "base_models/appearance_feature_extractor.pth")
    with np.load(folder / "network_golden.npz") as file:
        golden = {name: array[:1] for name, array in file.items()}
    feature = appearance(torch.from_numpy(golden["crops"]).permute(0, 3, 1, 2).float() / 255)
    dense = warping.dense_motion_network
    inputs = {
        names.FEATURE_3D: feature,
        names.FEATURE_COMPRESSED: F.relu(dense.norm(dense.compress(feature))),
        names.KP_SOURCE: torch.from_numpy(golden["kp_source"]),
        names.KP_DRIVING: torch.from_numpy(golden["kp_driving"]),
    }
    model = export_onnx(
        WarpDecode(warping, generator),
        {name: x if "feature" in name else x.repeat(2, 1, 1) for name, x in inputs.items()},
        {names.IMAGE: ("batch", 512, 512, 3)},
        {
            name: {0: "sources" if name in (names.FEATURE_3D, names.FEATURE_COMPRESSED) else "batch"}
            for name in inputs
        },
        17,
        WarpDecode.KEEP,
    )
    made = {name for node in model.graph.node for name in node.output}
    assert made >= set(WarpDecode.KEEP) and [o.name for o in model.graph.output] == [names.IMAGE]
    for name in WarpDecode.KEEP:
        model.graph.output.add().name = name
    runner = session(serialise(model))
    image, deformation, occlusion, warped = runner.run(
        [names.IMAGE, *WarpDecode.KEEP], {name: x.numpy() for name, x in inputs.items()}
    )
    assert np.abs(deformation[:, ::4, ::4, ::4] - golden["deformation"]).max() < 1e-5
    assert np.abs(occlusion[:, 0] - golden["occlusion_map"]).max() < 1e-5
    assert np.abs(warped[:, ::4, ::2, ::2] - golden["warped"]).max() < 1e-4
    difference = np.abs(image.astype(np.int16) - golden["image_u8"])
    assert difference.max() <= 1 and np.mean(difference == 0) > 0.998
