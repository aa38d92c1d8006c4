"""The graphs of the LivePortrait family against PyTorch and, where the shared data are, against the golden outputs.

The warp with the decoder has tests of its own; here are F, M, S and both R at full size, with random weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.errors import ConfigError
from lp_edge.export.lint import lint
from lp_edge.export.liveportrait import graphs
from lp_edge.export.liveportrait.graphs import GRAPHS, OPSETS, build_graph
from lp_edge.export.networks import (
    AppearanceFeatureExtractor,
    LivePortraitNetworks,
    MotionExtractor,
    StitchingNetwork,
    create,
)
from lp_edge.export.onnx_export import opset_of, serialise

SMALL = (names.STITCHING, names.RETARGET_EYE, names.RETARGET_LIP)


@pytest.fixture(scope="module")
def networks() -> LivePortraitNetworks:
    torch.manual_seed(11)
    made = create()
    # Fresh batch norms and response norms do nothing; trained ones do.
    for module in made.appearance.modules():
        disturb(module)
    disturb(made.warping.dense_motion_network.norm)
    for module in made.motion.modules():
        if hasattr(module, "gamma"):
            module.gamma.normal_(0, 0.5)
            module.beta.normal_(0, 0.5)
        elif isinstance(module, torch.nn.LayerNorm):
            module.weight.normal_(1, 0.2)
            module.bias.normal_(0, 0.2)
        elif isinstance(module, torch.nn.Linear) and module.out_features == 66:
            module.weight.normal_(0, 0.05)
    return made


def disturb(module: Any) -> None:
    if hasattr(module, "running_mean"):
        module.running_mean.normal_(0, 0.3)
        module.running_var.uniform_(0.5, 1.5)
        module.weight.normal_(1, 0.3)
        module.bias.normal_(0, 0.3)


@pytest.fixture(scope="module")
def models(networks: LivePortraitNetworks) -> dict[tuple[str, str], Any]:
    """Graphs in both flavours, made once: M's weights alone are 112 MB."""
    wanted = [(name, flavor) for flavor in OPSETS for name in GRAPHS if name != names.WARP_DECODE]
    return {key: build_graph(key[0], networks, flavor=key[1]) for key in wanted}


def crops(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, 256, 256, 3), dtype=np.uint8)


def planes(image: np.ndarray) -> Any:
    return torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255.0


def run(model: Any, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    with open_runner(serialise(model), BackendConfig("cpu", threads=2), name="graph") as runner:
        return {name: np.array(value) for name, value in runner.infer(inputs).items()}


def in_degrees(logits: np.ndarray) -> np.ndarray:
    """The expectation over 66 bins of 3 degrees, in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return ((weights / weights.sum(1, keepdims=True)) @ np.arange(66) * 3 - 97.5)[:, None]


def motion_of(heads: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    points = {name: heads[name].reshape(-1, 21, 3) for name in (names.EXP, names.KP)}
    angles = {name: in_degrees(heads[name]) for name in (names.PITCH, names.YAW, names.ROLL)}
    return {**angles, **points, names.T: heads["t"], names.SCALE: heads["scale"].reshape(-1, 1)}


def compare(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], atol: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert got[name].dtype == np.float32, name
        np.testing.assert_allclose(got[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("flavor", OPSETS)
def test_all_pass_the_linter(models: dict[tuple[str, str], Any], flavor: str) -> None:
    for name in GRAPHS[:2] + SMALL:
        model = models[name, flavor]
        assert lint(model, flavor) == [], name
        assert opset_of(model) == OPSETS[flavor]


@pytest.mark.parametrize("flavor", OPSETS)
def test_motion_equals_pytorch(
    networks: LivePortraitNetworks, models: dict[tuple[str, str], Any], flavor: str
) -> None:
    image = crops(2)
    with torch.no_grad():
        heads = {name: value.numpy() for name, value in networks.motion(planes(image)).items()}
    want = motion_of(heads)
    assert (
        np.ptp([want[name] for name in (names.PITCH, names.YAW, names.ROLL)]) > 1.0
    )  # not all the same angle
    compare(run(models[names.MOTION, flavor], image=image), want, 1e-4)
    first = {name: value[:1] for name, value in want.items()}
    compare(run(models[names.MOTION, flavor], image=image[:1]), first, 1e-4)


def test_motion_has_fused_norms_in_the_main_flavor_only(models: dict[tuple[str, str], Any]) -> None:
    def count(flavor: str) -> int:
        return sum(n.op_type == "LayerNormalization" for n in models[names.MOTION, flavor].graph.node)

    assert count("main") == 23
    assert count("tensorrt8") == 0


def test_appearance_equals_pytorch(
    networks: LivePortraitNetworks, models: dict[tuple[str, str], Any]
) -> None:
    image = crops(2, 1)
    dense = networks.warping.dense_motion_network
    with torch.no_grad():
        feature = networks.appearance(planes(image[:1]))
        compressed = torch.relu(dense.norm(dense.compress(feature)))
    want = {names.FEATURE_3D: feature.numpy(), names.FEATURE_COMPRESSED: compressed.numpy()}
    assert all(value.std() > 0.05 for value in want.values())
    both = run(models[names.APPEARANCE, "main"], image=image)
    compare({name: value[:1] for name, value in both.items()}, want, 1e-4)
    compare(run(models[names.APPEARANCE, "main"], image=image[:1]), want, 1e-4)


def test_appearance_in_half_precision(
    networks: LivePortraitNetworks, models: dict[tuple[str, str], Any]
) -> None:
    before = {name: value.dtype for name, value in networks.appearance.state_dict().items()}
    half = build_graph(names.APPEARANCE, networks, precision="fp16")
    assert {name: value.dtype for name, value in networks.appearance.state_dict().items()} == before
    assert lint(half, "main") == []
    weights = {t.data_type for t in half.graph.initializer if len(t.dims) > 3 and t.dims[0] > 4}
    assert weights == {onnx.TensorProto.FLOAT16}
    image = crops(1, 2)
    full = run(models[names.APPEARANCE, "main"], image=image)
    got = run(half, image=image)
    for name, value in full.items():
        error = np.sqrt(np.square(got[name] - value).mean()) / value.std()
        assert 0 < error < 2e-3, name


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_equal_pytorch(
    networks: LivePortraitNetworks, models: dict[tuple[str, str], Any], name: str
) -> None:
    network = getattr(networks, name)
    for batch in (1, 3):
        features = np.random.default_rng(batch).normal(size=(batch, network.mlp[0].in_features))
        features = features.astype(np.float32)
        with torch.no_grad():
            want = network(torch.from_numpy(features)).numpy()
        for flavor in OPSETS:
            compare(run(models[name, flavor], features=features), {names.DELTA: want}, 1e-5)


def test_fp16_leaves_small_networks_alone(
    networks: LivePortraitNetworks, models: dict[tuple[str, str], Any]
) -> None:
    half = build_graph(names.STITCHING, networks, precision="fp16")
    assert serialise(half) == serialise(models[names.STITCHING, "main"])


def test_warp_decode_is_asked_for_as_agreed(
    networks: LivePortraitNetworks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the module, which has tests of its own: names, shapes, dynamic axes, kept tensors, options."""
    asked: list[Any] = []

    class Stub(torch.nn.Module):
        KEEP = graphs.WarpDecode.KEEP

        def __init__(self, *parts: Any, **options: Any) -> None:
            super().__init__()
            asked.append((parts, options))

        def forward(self, feature_3d: Any, feature_compressed: Any, kp_source: Any, kp_driving: Any) -> Any:
            shift = (kp_source - kp_driving).sum((1, 2)).reshape(-1, 1, 1, 1) + feature_3d.mean()
            deformation = shift * 2.0
            occlusion = deformation + feature_compressed.mean()
            warped = occlusion * 3.0
            image = (warped + torch.zeros(1, 512, 512, 3)).to(torch.uint8)
            return image, deformation, occlusion, warped

    monkeypatch.setattr(graphs, "WarpDecode", Stub)
    model = build_graph(names.WARP_DECODE, networks, flavor="tensorrt8", precision="fp16")
    assert asked == [((networks.warping, networks.generator), {"half": True, "flavor": "tensorrt8"})]
    shapes = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        names.FEATURE_3D: ("sources", 32, 16, 64, 64),
        names.FEATURE_COMPRESSED: ("sources", 4, 16, 64, 64),
        names.KP_SOURCE: ("batch", 21, 3),
        names.KP_DRIVING: ("batch", 21, 3),
        names.IMAGE: ("batch", 512, 512, 3),
    }
    made = {name for node in model.graph.node for name in node.output}
    assert {names.DEFORMATION, names.OCCLUSION_MAP, names.WARPED} <= made
    assert opset_of(model) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "decoder"}, "unknown graph 'decoder'; expected one of appearance_feature_extractor"),
        ({"flavor": "jetson"}, "unknown flavour 'jetson'; expected one of main, tensorrt8"),
        ({"precision": "int8"}, "unknown precision 'int8'; expected one of fp32, fp16"),
    ],
)
def test_unknown_choices(networks: LivePortraitNetworks, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_graph(**{"name": "stitching", "networks": networks, **options})


@pytest.fixture(scope="module")
def golden_networks(shared: Path, networks: LivePortraitNetworks) -> LivePortraitNetworks:
    """Networks with the weights that the golden outputs were computed from; W and G keep their random ones."""
    path = shared / "liveportrait" / "make_checkpoints.py"
    spec = importlib.util.spec_from_file_location("make_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)

    def filled(network: Any, key: str, part: str = "") -> Any:
        table = make.KEYS[key][part] if part else make.KEYS[key]
        network.load_state_dict(make.fill(f"{key}/{part}" if part else key, table))
        return network

    retargeting = "retargeting_models/stitching_retargeting_module.pth"
    return replace(
        networks,
        appearance=filled(AppearanceFeatureExtractor(), "base_models/appearance_feature_extractor.pth"),
        motion=filled(MotionExtractor(), "base_models/motion_extractor.pth"),
        stitching=filled(StitchingNetwork(126, 65, (128, 128, 64)), retargeting, "retarget_shoulder"),
        retarget_eye=filled(StitchingNetwork(66, 63, (256, 256, 128, 128, 64)), retargeting, "retarget_eye"),
        retarget_lip=filled(StitchingNetwork(65, 63, (128, 128, 64)), retargeting, "retarget_mouth"),
    )


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "liveportrait" / "network_golden.npz", allow_pickle=False) as table:
        return dict(table)


def test_golden_motion(golden_networks: LivePortraitNetworks, golden: dict[str, np.ndarray]) -> None:
    model = build_graph(names.MOTION, golden_networks, precision="fp16")  # float32 all the same
    heads = {key.removeprefix("motion_"): value for key, value in golden.items() if key.startswith("motion_")}
    compare(run(model, image=golden["crops"]), motion_of(heads), 1e-4)


def test_golden_feature(golden_networks: LivePortraitNetworks, golden: dict[str, np.ndarray]) -> None:
    model = build_graph(names.APPEARANCE, golden_networks)
    got = run(model, image=golden["crops"])[names.FEATURE_3D][:, :, ::4, ::4, ::4]
    np.testing.assert_allclose(got, golden["feature_3d"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "key", "other"),
    [
        (names.STITCHING, "stitching", "kp_driving"),
        (names.RETARGET_EYE, "eye", "eye_ratio"),
        (names.RETARGET_LIP, "lip", "lip_ratio"),
    ],
)
def test_golden_small_networks(
    golden_networks: LivePortraitNetworks, golden: dict[str, np.ndarray], name: str, key: str, other: str
) -> None:
    second = golden[other].reshape(golden[other].shape[0] if golden[other].ndim > 1 else 1, -1)
    features = np.concatenate(
        (golden["kp_source"].reshape(2, -1), np.broadcast_to(second, (2, second.shape[1]))), axis=1
    )
    got = run(build_graph(name, golden_networks), features=features.astype(np.float32))
    compare(got, {names.DELTA: golden[key]}, 1e-5)
