from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra (torch) is not installed")

from torch import Tensor, nn  # noqa: TID253

from lp_edge.export import networks
from lp_edge.export.networks.generator import Spade, SpadeBlock
from lp_edge.export.networks.layers import ConvBlock, SpectralConv2d, identity_grid, keypoint_heatmaps
from lp_edge.export.networks.motion import HEADS, GlobalResponseNorm
from lp_edge.export.networks.warping import DenseMotionNetwork

BASE = "base_models/{}.pth"
NESTED = "retargeting_models/stitching_retargeting_module.pth"
# Field -> where its table stands in state_dicts.json, number of keys, digest of all keys, shapes and dtypes.
TABLES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "appearance": ((BASE.format("appearance_feature_extractor"),), 107, "ad8f293c048e7cc9"),
    "motion": ((BASE.format("motion_extractor"),), 212, "9710de64e7f449b0"),
    "warping": ((BASE.format("warping_module"),), 97, "f96762dd1efe21f8"),
    "generator": ((BASE.format("spade_generator"),), 182, "8f176ddbbcbf662d"),
    "stitching": ((NESTED, "retarget_shoulder"), 8, "9615105e0346c054"),
    "retarget_eye": ((NESTED, "retarget_eye"), 12, "acc5f59f4bfad629"),
    "retarget_lip": ((NESTED, "retarget_mouth"), 8, "2491a7e70fe08bff"),
}


@pytest.fixture(scope="module")
def created() -> networks.LivePortraitNetworks:
    torch.manual_seed(3)
    return networks.create()


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def table_of(module: nn.Module) -> dict[str, list[Any]]:
    return {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in module.state_dict().items()}


def digest(table: Mapping[str, list[Any]]) -> str:
    lines = (f"{key} {shape} {dtype}" for key, (shape, dtype) in sorted(table.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def gap(a: Tensor, b: Any) -> float:
    return float((a - torch.as_tensor(np.asarray(b))).abs().max())


# -- keys and shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("field", TABLES)
def test_keys_and_shapes_are_the_recorded_ones(created: networks.LivePortraitNetworks, field: str) -> None:
    _, count, recorded = TABLES[field]
    table = table_of(getattr(created, field))
    assert (len(table), digest(table)) == (count, recorded)


@pytest.mark.parametrize("field", TABLES)
def test_keys_and_shapes_are_the_official_ones(
    created: networks.LivePortraitNetworks, field: str, shared: Path
) -> None:
    want = json.loads((shared / "liveportrait" / "state_dicts.json").read_text())
    for step in TABLES[field][0]:
        want = want[step]
    assert table_of(getattr(created, field)) == want


def test_networks_are_frozen(created: networks.LivePortraitNetworks) -> None:
    for field in TABLES:
        module = getattr(created, field)
        assert not any(m.training for m in module.modules()), field
        assert not any(p.requires_grad for p in module.parameters()), field


# -- parity with the reference -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(shared: Path) -> Mapping[str, Any]:
    with np.load(shared / "liveportrait" / "network_golden.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def loaded(created: networks.LivePortraitNetworks, shared: Path) -> networks.LivePortraitNetworks:
    """The weights that the golden outputs belong to, drawn in memory."""
    place = shared / "liveportrait" / "make_checkpoints.py"
    spec = importlib.util.spec_from_file_location("make_checkpoints", place)
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    full = networks.create()
    for field, (steps, _, _) in TABLES.items():
        table = maker.KEYS
        for step in steps:
            table = table[step]
        getattr(full, field).load_state_dict(maker.fill("/".join(steps), table))
    return full


def crops(golden: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(golden["crops"]).permute(0, 3, 1, 2).float() / 255


def test_motion_extractor_parity(loaded: networks.LivePortraitNetworks, golden: Mapping[str, Any]) -> None:
    got = loaded.motion(crops(golden))
    for name in HEADS:
        assert gap(got[name], golden[f"motion_{name}"]) <= 1e-5, name


def test_stitching_and_retargeting_parity(
    loaded: networks.LivePortraitNetworks, golden: Mapping[str, Any]
) -> None:
    source, driving = (torch.from_numpy(golden[f"kp_{n}"]).flatten(1) for n in ("source", "driving"))
    for name, module, extra in (
        ("stitching", loaded.stitching, driving),
        ("eye", loaded.retarget_eye, torch.from_numpy(golden["eye_ratio"])),
        ("lip", loaded.retarget_lip, torch.from_numpy(golden["lip_ratio"])),
    ):
        assert gap(module(torch.cat((source, extra), dim=1)), golden[name]) <= 1e-5, name


def test_appearance_warp_and_decoder_parity(
    loaded: networks.LivePortraitNetworks, golden: Mapping[str, Any]
) -> None:
    """One input all the way, because W and G take seconds."""
    one = slice(1, 2)
    source, driving = (torch.from_numpy(golden[f"kp_{n}"])[one] for n in ("source", "driving"))
    feature = loaded.appearance(crops(golden)[one])
    assert gap(feature[:, :, ::4, ::4, ::4], golden["feature_3d"][one]) <= 1e-4
    out = loaded.warping(feature, source, driving)
    assert gap(out["deformation"][:, ::4, ::4, ::4], golden["deformation"][one]) <= 1e-4
    assert gap(out["occlusion_map"][:, 0], golden["occlusion_map"][one]) <= 1e-4
    assert gap(out["warped"][:, ::4, ::2, ::2], golden["warped"][one]) <= 1e-4
    image = loaded.generator(out["warped"])
    assert gap(image[:, :, ::4, ::4], golden["image"][one]) <= 1e-3
    levels = (image.permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy().astype(np.int16)
    apart = np.abs(levels - golden["image_u8"][one])
    assert apart.max() <= 3 and (apart <= 1).mean() >= 0.999


# -- conventions that a golden file shows only as a number -------------------------------------------


def test_identity_grid_reaches_both_ends_and_is_ordered_x_y_z() -> None:
    grid = identity_grid(3, 5, 9, torch.zeros(1))
    assert grid.shape == (3, 5, 9, 3)
    assert grid[0, 0, 0].tolist() == [-1, -1, -1]
    assert grid[-1, -1, -1].tolist() == [1, 1, 1]
    assert grid[0, 0, 1].tolist() == [-0.75, -1, -1]
    assert grid[0, 1, 0].tolist() == [-1, -0.5, -1]
    assert grid[1, 0, 0].tolist() == [-1, -1, 0]


def test_heat_map_peaks_at_its_keypoint_and_falls_as_a_gaussian() -> None:
    grid = identity_grid(3, 5, 9, torch.zeros(1))
    heat = keypoint_heatmaps(torch.tensor([[[0.25, -0.5, 0.0], [9.0, 9.0, 9.0]]]), grid, variance=0.1)
    assert heat.shape == (1, 2, 3, 5, 9)
    assert np.unravel_index(int(heat[0, 0].argmax()), (3, 5, 9)) == (1, 1, 5)
    assert heat[0, 0, 1, 1, 5] == 1.0
    assert float(heat[0, 0, 1, 1, 6]) == pytest.approx(np.exp(-(0.25**2) / 0.2), rel=1e-5)
    assert float(heat[0, 1].max()) == 0.0


@pytest.fixture(scope="module")
def dense() -> DenseMotionNetwork:
    torch.manual_seed(11)
    return DenseMotionNetwork().eval()


def keypoints(seed: int) -> Tensor:
    return torch.rand((1, 21, 3), generator=torch.Generator().manual_seed(seed)) - 0.5


def test_equal_keypoints_leave_everything_where_it_is(dense: DenseMotionNetwork) -> None:
    feature = torch.randn(1, 32, 16, 32, 32)
    out = dense(feature, keypoints(1), keypoints(1))
    assert gap(out["deformation"][0], identity_grid(16, 32, 32, feature)) <= 1e-6


@pytest.mark.parametrize("index", [0, 1, 21])
def test_a_mask_that_picks_one_motion_shifts_by_that_keypoint(dense: DenseMotionNetwork, index: int) -> None:
    """Motion 0 stays; motion k moves driving keypoint k - 1 onto the source's."""
    source, driving = keypoints(1), keypoints(2)
    feature = torch.randn(1, 32, 16, 32, 32)
    bias = dense.mask.bias.clone()
    try:
        dense.mask.bias[index] += 1e4
        out = dense(feature, source, driving)
    finally:
        dense.mask.bias.copy_(bias)
    shift = torch.zeros(3) if index == 0 else (source - driving)[0, index - 1]
    assert gap(out["deformation"][0], identity_grid(16, 32, 32, feature) + shift) <= 1e-6


def test_hourglass_sees_per_motion_one_heat_map_and_the_shifted_volume(dense: DenseMotionNetwork) -> None:
    source, driving = keypoints(1), keypoints(2)
    driving[0, 4] = source[0, 4]
    feature = torch.randn(1, 32, 16, 32, 32)
    seen: list[Tensor] = []
    hook = dense.hourglass.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        dense(feature, source, driving)
    finally:
        hook.remove()
    parts = seen[0].unflatten(1, (22, 5))
    grid = identity_grid(16, 32, 32, feature)
    assert parts[0, 0, 0].abs().max() == 0
    assert parts[0, 5, 0].abs().max() == 0  # keypoint 4 does not move
    assert gap(parts[0, 5, 1:], parts[0, 0, 1:]) <= 1e-4
    want = keypoint_heatmaps(driving, grid)[0, 7] - keypoint_heatmaps(source, grid)[0, 7]
    assert gap(parts[0, 8, 0], want) <= 1e-6


def test_volume_is_sampled_half_a_cell_off_its_own_grid(dense: DenseMotionNetwork) -> None:
    """Positions are made with aligned corners and read without: cell i reads at i·W/(W-1) - 1/2."""
    ramp = torch.arange(32.0).expand(1, 32, 16, 32, 32) + 100
    weight = dense.compress.weight.clone()
    seen: list[Tensor] = []
    hook = dense.hourglass.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        dense.compress.weight.fill_(1 / 32)
        dense(ramp, keypoints(1), keypoints(1))
    finally:
        hook.remove()
        dense.compress.weight.copy_(weight)
    row = seen[0][0, 1, 8, 16]
    inner = torch.arange(1.0, 31.0)
    # running statistics are 0 and 1, so the norm only divides by sqrt(1 + eps)
    want = (inner * 32 / 31 - 0.5 + 100 + dense.compress.bias[0]) / np.sqrt(1 + 1e-5)
    assert gap(row[1:31], want) <= 1e-2
    assert gap(row[1:31], want + 0.5) > 0.4


def test_hidden_cells_are_dark(created: networks.LivePortraitNetworks) -> None:
    network = created.warping
    occlusion = network.dense_motion_network.occlusion
    bias = occlusion.bias.clone()
    feature = torch.randn(1, 32, 16, 32, 32)
    try:
        occlusion.bias.fill_(-1e4)
        hidden = network(feature, keypoints(1), keypoints(2))
    finally:
        occlusion.bias.copy_(bias)
    assert hidden["warped"].abs().max() == 0 and hidden["occlusion_map"].shape == (1, 1, 32, 32)
    assert network(feature, keypoints(1), keypoints(2))["warped"].abs().max() > 0


def test_appearance_reads_channels_as_depth() -> None:
    network = networks.AppearanceFeatureExtractor().eval()
    flat: list[Tensor] = []
    network.second.register_forward_hook(lambda _, __, out: flat.append(out))
    for block in network.resblocks_3d:
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
    volume = network(torch.rand(2, 3, 16, 24))
    assert volume.shape == (2, 32, 16, 4, 6)
    assert torch.equal(volume[1, 5, 3], flat[0][1, 5 * 16 + 3])


def test_conv_block_resizes_height_and_width_only() -> None:
    x = torch.rand(1, 3, 2, 8, 8)
    assert ConvBlock(3, 3, 4, resize="up").eval()(x).shape == (1, 4, 2, 16, 16)
    assert ConvBlock(3, 3, 4, resize="down").eval()(x).shape == (1, 4, 2, 4, 4)
    assert ConvBlock(2, 3, 4).eval()(x[:, :, 0]).min() == 0  # ReLU
    assert ConvBlock(2, 3, 4, slope=0.01).eval()(x[:, :, 0]).min() < 0


def test_global_response_norm_is_its_formula() -> None:
    norm = GlobalResponseNorm(5)
    norm.gamma.copy_(torch.randn(5))
    norm.beta.copy_(torch.randn(5))
    x = torch.randn(2, 3, 4, 5)
    a = x.numpy().astype(np.float64)
    energy = np.sqrt((a**2).sum((1, 2), keepdims=True))
    relative = energy / energy.mean(-1, keepdims=True)
    want = norm.gamma.numpy() * a * relative + norm.beta.numpy() + a
    assert gap(norm(x), want) <= 1e-5


def test_pictures_of_a_batch_do_not_see_each_other(created: networks.LivePortraitNetworks) -> None:
    a, b = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    both, alone = created.motion(torch.cat((a, b))), created.motion(b)
    assert {n: v.shape[1] for n, v in both.items()} == HEADS
    assert all(gap(both[n][1:], alone[n]) <= 1e-5 for n in HEADS)
    a, b = torch.randn(1, 256, 4, 4), torch.randn(1, 256, 4, 4)
    image = created.generator(torch.cat((a, b)))
    assert image.shape == (2, 3, 32, 32) and image.min() >= 0 and image.max() <= 1
    assert gap(image[1:], created.generator(b)) <= 1e-4


def test_spectral_weight_is_torchs_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have another parametrisation with other keys
        theirs = nn.utils.spectral_norm(nn.Conv2d(6, 4, 3, padding=1)).eval()
    ours = SpectralConv2d(6, 4, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 6, 5, 5)
    assert gap(ours(x), theirs(x)) <= 1e-6
    before = ours.weight.clone()
    ours.weight_orig.mul_(7)
    assert gap(ours.weight, before) <= 1e-6


def test_fresh_spectral_weight_has_a_largest_singular_value_near_one() -> None:
    torch.manual_seed(5)
    weight = SpectralConv2d(64, 32, 3).weight.flatten(1)
    assert 0.95 <= float(torch.linalg.matrix_norm(weight, 2)) <= 1.3


def test_spade_normalises_each_channel_and_follows_its_condition() -> None:
    spade = Spade(8)
    for conv in (spade.mlp_gamma, spade.mlp_beta):
        conv.weight.zero_()
        conv.bias.zero_()
    x = 5 + 3 * torch.randn(2, 8, 12, 12)
    out = spade(x, torch.randn(2, 256, 6, 6))
    assert gap(out.mean((2, 3)), np.zeros((2, 8), np.float32)) <= 1e-5
    assert gap(out.var((2, 3), unbiased=False), np.ones((2, 8), np.float32)) <= 1e-4
    spade.mlp_beta.bias.copy_(torch.arange(8.0))
    spade.mlp_gamma.bias.fill_(1.0)
    assert gap(spade(x, torch.randn(2, 256, 6, 6)), 2 * out + torch.arange(8.0)[:, None, None]) <= 1e-5


def test_spade_enlarges_its_condition_by_nearest_neighbour() -> None:
    spade = Spade(8)
    small = torch.randn(1, 256, 3, 3)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = torch.randn(1, 8, 12, 12)
    assert gap(spade(x, small), spade(x, large)) == 0


def test_shortcut_is_learned_only_where_the_width_changes() -> None:
    x, condition = torch.randn(1, 16, 4, 4), torch.randn(1, 256, 4, 4)
    same, narrower = SpadeBlock(16, 16), SpadeBlock(16, 8)
    for block in (same, narrower):
        block.conv_1 = nn.Conv2d(block.conv_1.weight.shape[1], block.conv_1.weight.shape[0], 1)
        block.conv_1.requires_grad_(False)
        block.conv_1.weight.zero_()
        block.conv_1.bias.zero_()
    assert torch.equal(same(x, condition), x)
    want = narrower.conv_s(narrower.norm_s(x, condition))
    assert torch.equal(narrower(x, condition), want) and narrower.conv_s.bias is None


def test_stitching_network_is_a_perceptron() -> None:
    network = networks.StitchingNetwork(4, 3, (6, 5))
    x = torch.randn(2, 4)
    a = x.numpy()
    layers = [m for m in network.mlp if isinstance(m, nn.Linear)]
    for layer in layers[:-1]:
        a = np.maximum(a @ layer.weight.numpy().T + layer.bias.numpy(), 0)
    assert gap(network(x), a @ layers[-1].weight.numpy().T + layers[-1].bias.numpy()) <= 1e-6
