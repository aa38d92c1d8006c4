"""The export driver, on stand-in networks with the real tensors: rows, manifest, refusals, and what a failure leaves behind."""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra (torch) is not installed")
onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.bundle import BundleWriter, CheckpointEntry, builtin_directory, open_bundle
from lp_edge.errors import BackendUnavailable, BundleError, ConfigError, ExportError
from lp_edge.export.inventory import UNVERIFIED
from lp_edge.export.liveportrait import build as driver
from lp_edge.export.liveportrait import parity
from lp_edge.export.networks import LivePortraitNetworks, StitchingNetwork
from lp_edge.export.onnx_export import export_onnx
from lp_edge.export.verify import verify_bundle

nn, F = torch.nn, torch.nn.functional


# -- stand-ins: the tensors of the real networks at a thousandth of their work ----------------------------


class Appearance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 512, 4, stride=4)

    def forward(self, image: Any) -> Any:
        return self.conv(image).reshape(-1, 32, 16, 64, 64)


class Motion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"pitch": 66, "yaw": 66, "roll": 66, "t": 3, "exp": 63, "scale": 1, "kp": 63}
        self.heads = nn.ModuleDict({f"fc_{n}": nn.Linear(48, s) for n, s in sizes.items()})

    def forward(self, image: Any) -> dict[str, Any]:
        pooled = F.avg_pool2d(image, 64).flatten(1)
        return {name.removeprefix("fc_"): head(pooled) for name, head in self.heads.items()}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.compress = nn.Conv3d(32, 4, 1)
        self.norm = nn.BatchNorm3d(4)


class Warping(nn.Module):
    """Moves nothing, but depends on every input."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_motion_network = Dense()

    def forward(self, feature_3d: Any, kp_source: Any, kp_driving: Any) -> dict[str, Any]:
        dense = self.dense_motion_network
        return self.with_compressed(
            feature_3d, F.relu(dense.norm(dense.compress(feature_3d))), kp_source, kp_driving
        )

    def with_compressed(self, feature: Any, compressed: Any, source: Any, driving: Any) -> dict[str, Any]:
        shift = (driving - source).mean(1)[:, None, None, None]
        deformation = shift + compressed.mean(1)[..., None].expand(-1, -1, -1, -1, 3)
        occlusion = torch.sigmoid(feature.mean((1, 2)) + shift[:, 0, :, :, 0])[:, None]
        warped = feature.flatten(1, 2)[:, :256] * occlusion + deformation.mean((1, 4))[:, None]
        return {"deformation": deformation, "occlusion_map": occlusion, "warped": warped}


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 3, 1)

    def forward(self, feature: Any) -> Any:
        return F.interpolate(torch.sigmoid(self.conv(feature)), scale_factor=8.0)


def create() -> LivePortraitNetworks:
    torch.manual_seed(11)
    return LivePortraitNetworks(
        appearance=Appearance(),
        motion=Motion(),
        warping=Warping(),
        generator=Generator(),
        stitching=StitchingNetwork(126, 65, (8,)),
        retarget_eye=StitchingNetwork(66, 63, (8,)),
        retarget_lip=StitchingNetwork(65, 63, (8,)),
    )


def load(
    folder: Path, *, variant: str, allow_unverified: bool
) -> tuple[LivePortraitNetworks, tuple[Any, ...]]:
    licence = UNVERIFIED if allow_unverified else "MIT"
    return create(), (CheckpointEntry(f"{folder.name}/{variant}.pth", f"{len(folder.name):064x}", licence),)


class AppearanceGraph(nn.Module):
    def __init__(self, networks: LivePortraitNetworks) -> None:
        super().__init__()
        self.f, self.dense = networks.appearance, networks.warping.dense_motion_network

    def forward(self, image: Any) -> tuple[Any, Any]:
        feature = self.f(image.float().permute(0, 3, 1, 2) / 255)
        return feature, F.relu(self.dense.norm(self.dense.compress(feature)))


class MotionGraph(nn.Module):
    def __init__(self, networks: LivePortraitNetworks) -> None:
        super().__init__()
        self.m = networks.motion

    def forward(self, image: Any) -> tuple[Any, ...]:
        heads = self.m(image.float().permute(0, 3, 1, 2) / 255)
        bins = torch.arange(66, dtype=torch.float32)
        angles = [
            (heads[n].softmax(1) * bins).sum(1, keepdim=True) * 3 - 97.5 for n in ("pitch", "yaw", "roll")
        ]
        exp, kp = (heads[n].reshape(-1, 21, 3) for n in ("exp", "kp"))
        return (*angles, heads["t"], exp, heads["scale"], kp)


class WarpGraph(nn.Module):
    def __init__(self, networks: LivePortraitNetworks, half: bool) -> None:
        super().__init__()
        self.w, self.g = networks.warping, networks.generator
        self.dtype = torch.float16 if half else torch.float32

    def forward(self, feature: Any, compressed: Any, source: Any, driving: Any) -> tuple[Any, ...]:
        inside = self.w.with_compressed(feature, compressed, source, driving)
        conv = self.g.conv
        weight, bias = conv.weight.to(self.dtype), conv.bias.to(self.dtype)
        image = torch.sigmoid(F.conv2d(inside["warped"].to(self.dtype), weight, bias).float())
        image = F.interpolate(image, scale_factor=8.0)
        image = (image.permute(0, 2, 3, 1) * 255).clamp(0, 255).to(torch.uint8)
        return image, inside["deformation"], inside["occlusion_map"], inside["warped"]


def build_graph(
    name: str, networks: LivePortraitNetworks, *, flavor: str = "main", precision: str = "fp32"
) -> Any:
    opset = {"main": 17, "tensorrt8": 16}[flavor]
    batch = {0: "batch"}
    if name in parity.NETWORKS[:3]:
        width = {"stitching": (126, 65), "retarget_eye": (66, 63), "retarget_lip": (65, 63)}[name]
        return export_onnx(
            getattr(networks, name),
            {names.FEATURES: torch.zeros(2, width[0])},
            {names.DELTA: ("batch", width[1])},
            {names.FEATURES: batch},
            opset,
        )
    image = {names.IMAGE: torch.zeros(2, 256, 256, 3, dtype=torch.uint8)}
    if name == names.APPEARANCE:
        outputs = {
            names.FEATURE_3D: ("batch", 32, 16, 64, 64),
            names.FEATURE_COMPRESSED: ("batch", 4, 16, 64, 64),
        }
        return export_onnx(AppearanceGraph(networks), image, outputs, {names.IMAGE: batch}, opset)
    if name == names.MOTION:
        one, three, points = ("batch", 1), ("batch", 3), ("batch", 21, 3)
        shapes = (one, one, one, three, points, one, points)
        order = (names.PITCH, names.YAW, names.ROLL, names.T, names.EXP, names.SCALE, names.KP)
        return export_onnx(
            MotionGraph(networks), image, dict(zip(order, shapes, strict=True)), {names.IMAGE: batch}, opset
        )
    return export_onnx(
        WarpGraph(networks, precision == "fp16"),
        {
            names.FEATURE_3D: torch.zeros(1, 32, 16, 64, 64),
            names.FEATURE_COMPRESSED: torch.zeros(1, 4, 16, 64, 64),
            names.KP_SOURCE: torch.zeros(2, 21, 3),
            names.KP_DRIVING: torch.zeros(2, 21, 3),
        },
        {names.IMAGE: ("batch", 512, 512, 3)},
        {
            names.FEATURE_3D: {0: "sources"},
            names.FEATURE_COMPRESSED: {0: "sources"},
            names.KP_SOURCE: batch,
            names.KP_DRIVING: batch,
        },
        opset,
        keep=(names.DEFORMATION, names.OCCLUSION_MAP, names.WARPED),
    )


@functools.cache
def yardstick() -> parity.Yardstick:
    return parity.Yardstick.of(create())


def build(output: Path, **options: Any) -> driver.BuildReport:
    options = {
        "weights": Path("weights"),
        "load": load,
        "build_graph": build_graph,
        "reference": lambda _: yardstick(),
        **options,
    }
    return driver.build(output, **options)


@pytest.fixture(scope="module")
def _built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, driver.BuildReport, list[str]]:
    folder = tmp_path_factory.mktemp("built") / "human"
    lines: list[str] = []
    return folder, build(folder, report=lines.append), lines


@pytest.fixture
def built(_built: tuple[Path, driver.BuildReport, list[str]]) -> tuple[Path, driver.BuildReport, list[str]]:
    if not (builtin_directory() / "manifest.json").is_file():
        pytest.skip("the built-in bundle is not there")
    return _built


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- what is built ---------------------------------------------------------------------------------------


def test_the_bundle_holds_all_networks_tables_and_what_it_came_from(
    built: tuple[Path, driver.BuildReport, list[str]],
) -> None:
    folder, result, _ = built
    bundle = open_bundle(folder)
    m = bundle.manifest
    assert (m.family, m.variant, m.keypoints, m.licence) == (
        "liveportrait",
        "human",
        21,
        "MIT AND Apache-2.0",
    )
    assert set(m.networks) == {*parity.NETWORKS, names.FACE_DETECTOR, names.FACE_MESH}
    assert set(m.files) == {
        "canonical", "liveportrait_map", "face_detector_card", "face_mesh_card", "parity", "report"
    }  # fmt: skip
    assert m.checkpoints == result.checkpoints
    assert m.regions["lip"] == (6, 12, 14, 17, 19, 20) and m.regions["eyes"] == (11, 13, 15, 16, 18)
    assert sorted(i for region in m.regions.values() for i in region) == list(range(21))
    assert dict(m.sizes) == {"input": 256, "crop": 512}
    origin = open_bundle()
    for name in (names.FACE_DETECTOR, names.FACE_MESH):
        assert m.networks[name].sha256 == origin.network(name).sha256
    assert left_behind(folder.parent) == ["human"]


def test_rows_manifest_and_report_agree(built: tuple[Path, driver.BuildReport, list[str]]) -> None:
    folder, result, _ = built
    bundle = open_bundle(folder)
    report = json.loads(bundle.path_of_file("report").read_text())
    assert (report["variant"], report["precision"], report["flavor"]) == ("human", "fp32", "main")
    assert report["checkpoints"][0]["licence"] == "MIT"
    for row, told in zip(result.networks, report["networks"], strict=True):
        entry = bundle.network(row.name)
        assert (row.size, row.opset, row.precision) == (entry.size, entry.opset, entry.precision)
        assert row.parity == told["parity"] == dict(entry.parity)
        assert row.nodes == told["nodes"] == len(onnx.load(bundle.path_of(row.name)).graph.node)
    for name in parity.NETWORKS:
        assert set(bundle.network(name).parity) >= set(parity.TOLERANCES["fp32"][name])
        assert report["tolerances"][name] == dict(parity.TOLERANCES["fp32"][name])
    warp = bundle.network(names.WARP_DECODE)
    assert warp.opset == 17 and warp.parity["image_max"] <= 1
    assert next(s.shape for s in warp.inputs) == ("sources", 32, 16, 64, 64)


def test_every_step_is_told(built: tuple[Path, driver.BuildReport, list[str]]) -> None:
    lines = built[2]
    for name in parity.NETWORKS:
        assert f"exporting {name}" in lines
    assert "licence of the bundle: MIT AND Apache-2.0" in lines


def test_other_weights_variants_flavours_and_precisions_are_recorded(tmp_path: Path) -> None:
    result = build(
        tmp_path / "b", allow_unverified=True, variant="animal", flavor="tensorrt8", precision="fp16"
    )
    bundle = open_bundle(tmp_path / "b")
    m = bundle.manifest
    assert m.variant == "animal"
    assert m.licence == f"{UNVERIFIED} AND Apache-2.0"
    assert m.checkpoints[0].licence == UNVERIFIED
    assert any("is not the official file" in w for w in result.warnings)
    assert {n.opset for name, n in m.networks.items() if name in parity.NETWORKS} == {16}
    assert m.networks[names.WARP_DECODE].precision == "fp16"
    assert m.networks[names.MOTION].precision == "fp32", "all its weights are fp32"
    assert m.networks[names.WARP_DECODE].parity["image_psnr_db"] >= 45
    report = json.loads(bundle.path_of_file("report").read_text())
    assert (report["variant"], report["precision"], report["flavor"]) == ("animal", "fp16", "tensorrt8")
    assert report["tolerances"][names.WARP_DECODE] == dict(parity.TOLERANCES["fp16"][names.WARP_DECODE])


def test_an_interrupted_export_leaves_the_older_bundle(
    built: tuple[Path, driver.BuildReport, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(built[0], tmp_path / "b")
    before = (tmp_path / "b" / "manifest.json").read_bytes()

    def stop(line: str) -> None:
        if line == "exporting retarget_eye":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "b", variant="animal", report=stop)
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before
    assert left_behind(tmp_path) == ["b"]


# -- what fails ---------------------------------------------------------------------------------------------


def _altered(change: Callable[[str, Any], None]) -> Callable[..., Any]:
    def graph(name: str, networks: LivePortraitNetworks, **options: Any) -> Any:
        model = build_graph(name, networks, **options)
        change(name, model)
        return model

    return graph


def _nudge(network: str, tensor: str, by: float) -> Callable[[str, Any], None]:
    """Adds a number to an output, or to a tensor inside."""

    def change(name: str, model: Any) -> None:
        if name != network:
            return
        graph = model.graph
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(by), "nudge"))
        at = next(i for i, node in enumerate(graph.node) if tensor in node.output)
        node = graph.node[at]
        node.output[list(node.output).index(tensor)] = f"{tensor}_before"
        for later in graph.node[at + 1 :]:
            for i, used in enumerate(later.input):
                later.input[i] = tensor if used == tensor else used
        added = onnx.helper.make_node("Add", [f"{tensor}_before", "nudge"], [tensor], name="nudged")
        graph.node.insert(at + 1, added)

    return change


def test_a_broken_tolerance_fails_the_export_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"stitching .*differs from PyTorch") as raised:
        build(tmp_path / "b", build_graph=_altered(_nudge(names.STITCHING, names.DELTA, 1e-4)))
    assert "delta_max" in raised.value.got and "delta_max 1e-05" in raised.value.expected
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("network", "tensor", "by", "figure"),
    [
        (names.RETARGET_LIP, names.DELTA, 1e-4, "delta_max"),
        (names.APPEARANCE, names.FEATURE_3D, 0.01, "feature_3d_max"),
        (names.APPEARANCE, names.FEATURE_COMPRESSED, 0.01, "feature_compressed_max"),
        (names.MOTION, names.YAW, 0.1, "degrees_max"),
        (names.MOTION, names.KP, float("nan"), "kp_max"),
        (names.WARP_DECODE, names.DEFORMATION, 0.01, "deformation_max"),
        (names.WARP_DECODE, names.OCCLUSION_MAP, 0.01, "occlusion_map_max"),
        (names.WARP_DECODE, names.WARPED, 0.5, "image_max"),
    ],
)
def test_every_tensor_is_measured(network: str, tensor: str, by: float, figure: str) -> None:
    model = build_graph(network, create())
    for altered in (False, True):
        if altered:
            _nudge(network, tensor, by)(network, model)
        inside = (
            onnx.ModelProto.FromString(model.SerializeToString()) if network == names.WARP_DECODE else None
        )
        figures, scales = parity.measure(network, model.SerializeToString(), yardstick(), inside=inside)
        assert (figure in parity.broken(network, "fp32", figures, scales)) is altered, figures


def test_a_finding_of_the_linter_fails_the_export(tmp_path: Path) -> None:
    def opset(name: str, model: Any) -> None:
        if name == names.RETARGET_EYE:
            model.opset_import[0].version = 20

    with pytest.raises(ExportError, match=r"retarget_eye.*opset"):
        build(tmp_path / "b", build_graph=_altered(opset))
    assert left_behind(tmp_path) == []


def test_a_full_disk_in_mid_export_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the small graphs fit, F does not
    try:
        with pytest.raises(BundleError, match="cannot be written") as raised:
            build(tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free space" in raised.value.remedy
    assert left_behind(tmp_path) == []


def test_a_place_that_holds_something_else_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "diary.txt").write_text("dear diary")

    def never(*_: object, **__: object) -> Any:
        raise AssertionError("worked")

    with pytest.raises(BundleError, match="not a bundle"):
        build(tmp_path / "b", load=never)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "robot"}, "robot"),
        ({"precision": "int4"}, "int4"),
        ({"flavor": "vanilla"}, "vanilla"),
        ({"offline": True}, "weights are given together"),
        ({"endpoint": "https://hub"}, "weights are given together"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        build(tmp_path / "b", **options)
    assert left_behind(tmp_path) == []


def test_without_weights_they_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fetch(variant: str, **options: Any) -> Path:
        asked.append((variant, options["offline"], options["endpoint"], options["allow_unverified"]))
        raise ExportError("stop here")

    monkeypatch.setattr(driver.hub, "fetch", fetch)
    with pytest.raises(ExportError, match="stop here"):
        build(tmp_path / "b", weights=None, variant="animal", endpoint="http://mirror")
    assert asked == [("animal", False, "http://mirror", False)]
    assert left_behind(tmp_path) == []


def test_the_default_folder_says_what_is_in_it() -> None:
    assert driver.default_output("human", "fp32") == Path("liveportrait-human-fp32")
    assert driver.default_output("animal", "fp16", "tensorrt8") == Path("liveportrait-animal-fp16-tensorrt8")


def test_weights_of_large_graphs_lie_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LARGE", 100_000)
    result = build(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    sizes = {row.name: row.size for row in result.networks}
    large = {n: e.data for n, e in bundle.manifest.networks.items() if n in parity.NETWORKS and e.data}
    assert names.APPEARANCE in large and names.RETARGET_LIP not in large
    for name, data in large.items():
        assert data.file == f"{name}.onnx.data" and data.size > 90_000
        assert sizes[name] == data.size + bundle.path_of(name).stat().st_size
    again = driver.verify(tmp_path / "b")
    assert {row.name: row.size for row in again.networks}.items() <= sizes.items()
    path = tmp_path / "b" / f"{names.APPEARANCE}.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"weights of appearance.* truncated"):
        driver.verify(tmp_path / "b")


# -- a finished bundle ------------------------------------------------------------------------------------


def test_verify_repeats_parity_without_the_weights(built: tuple[Path, driver.BuildReport, list[str]]) -> None:
    folder, result, _ = built
    again = driver.verify(folder)
    assert [row.name for row in again.networks] == list(parity.NETWORKS)
    for row in again.networks:
        assert set(row.parity) == set(open_bundle(folder).network(row.name).parity)
        assert not parity.broken(row.name, row.precision, row.parity, dict.fromkeys(row.parity, 1.0))
    assert again.licence == result.licence
    assert verify_bundle(folder)["family"] == "liveportrait"


def test_verify_with_the_weights_gives_the_same_figures(
    built: tuple[Path, driver.BuildReport, list[str]],
) -> None:
    folder, result, _ = built
    again = driver.verify(folder, weights=Path("weights"), load=load)
    for row, told in zip(again.networks, result.networks, strict=False):
        assert row.name == told.name
        assert row.parity == pytest.approx(told.parity, abs=1e-6)


def test_verify_refuses_other_weights(built: tuple[Path, driver.BuildReport, list[str]]) -> None:
    with pytest.raises(ExportError, match="has another") as raised:
        driver.verify(built[0], weights=Path("others"), load=load)
    assert "human.pth" in raised.value.got


@pytest.mark.parametrize("network", [names.RETARGET_LIP, names.APPEARANCE, names.WARP_DECODE])
def test_verify_finds_a_network_that_computes_something_else(
    network: str, built: tuple[Path, driver.BuildReport, list[str]], tmp_path: Path
) -> None:
    """A whole bundle with correct hashes, one graph of which is of other weights."""
    bundle = open_bundle(built[0])
    torch.manual_seed(5)
    other = build_graph(network, LivePortraitNetworks(**{**vars(create()), **_fresh()}))
    m = bundle.manifest
    with BundleWriter(
        tmp_path / "b",
        family=m.family,
        variant=m.variant,
        licence=m.licence,
        created_by="tests",
        keypoints=21,
        normalisation="",
    ) as writer:
        for name in parity.NETWORKS:
            data = other.SerializeToString() if name == network else bundle.path_of(name)
            writer.add_network(name, data, precision="fp32", opset=17)
        writer.add_table("parity", bundle.load_table("parity"))
    with pytest.raises(ExportError, match="differs from PyTorch"):
        driver.verify(tmp_path / "b")


def _fresh() -> dict[str, Any]:
    return {
        "appearance": Appearance(),
        "generator": Generator(),
        "warping": Warping(),
        "retarget_lip": StitchingNetwork(65, 63, (8,)),
    }


def test_verify_refuses_what_is_not_a_bundle_of_the_family(
    toy_bundle: Path, built: tuple[Path, driver.BuildReport, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="family mesh"):
        driver.verify(toy_bundle)
    with pytest.raises(BundleError, match="no folder"):
        verify_bundle(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--weights"):
        verify_bundle(toy_bundle, weights=tmp_path)


def test_verify_tells_a_table_that_is_not_the_yardstick(
    built: tuple[Path, driver.BuildReport, list[str]],
) -> None:
    table = open_bundle(built[0]).load_table("parity")
    del table["warped"]
    with pytest.raises(BundleError, match="no warped"):
        parity.Yardstick.from_table(table)
    with pytest.raises(BundleError, match="image as float32"):
        parity.Yardstick.from_table({**table, "warped": table["kp"], "image": table["kp"]})


def test_the_mesh_family_is_verified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own check runs on the bundle's graph and canonical face; tests of the warp show what it finds."""
    if not (builtin_directory() / "manifest.json").is_file():
        pytest.skip("the built-in bundle is not there")
    seen: list[tuple[Any, bytes]] = []

    def check(module: Any, graph: bytes) -> dict[str, float]:
        seen.append((module, graph))
        return {"deformation_max": 0.003}

    monkeypatch.setattr("lp_edge.export.mesh.build.verify", check)
    result = verify_bundle(builtin_directory())
    bundle = open_bundle()
    ((module, graph),) = seen
    assert graph == bundle.path_of(names.WARP_DECODE).read_bytes()
    assert np.array_equal(np.asarray(module.canonical), bundle.load_table("canonical")["points"])
    assert not module.training
    assert result["family"] == "mesh"
    assert result["networks"][0]["parity"] == {"deformation_max": 0.003}


# -- TensorRT, through Polygraphy ---------------------------------------------------------------------------


@pytest.fixture
def polygraphy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """Stand-ins of TensorRT and Polygraphy that run the graph on ONNX Runtime and note what they were asked for."""
    asked = types.SimpleNamespace(profiles=[], flags=[], error=0.0)

    class Profile(dict[str, Any]):
        def add(self, name: str, min: Any, opt: Any, max: Any) -> Profile:
            self[name] = (min, opt, max)
            return self

    def config(profiles: list[Profile], **flags: Any) -> dict[str, Any]:
        asked.profiles.append(dict(profiles[0]))
        asked.flags.append(flags)
        return flags

    class Runner(contextlib.AbstractContextManager["Runner"]):
        def __init__(self, path: str) -> None:
            self.runner = open_runner(Path(path), BackendConfig("cpu"))

        def __exit__(self, *_: object) -> None:
            self.runner.close()

        def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
            outputs = self.runner.infer(feeds)
            return {k: v if v.dtype == np.uint8 else np.asarray(v) + asked.error for k, v in outputs.items()}

    backend = types.ModuleType("polygraphy.backend.trt")
    backend.Profile, backend.CreateConfig, backend.TrtRunner = Profile, config, Runner
    backend.NetworkFromOnnxPath = lambda path, strongly_typed=None: path
    backend.EngineFromNetwork = lambda network, config: network
    tensorrt = types.ModuleType("tensorrt")
    tensorrt.__version__ = "8.6.1"
    tensorrt.NetworkDefinitionCreationFlag = types.SimpleNamespace()
    for name, module in (
        ("tensorrt", tensorrt),
        ("polygraphy", types.ModuleType("polygraphy")),
        ("polygraphy.backend", types.ModuleType("polygraphy.backend")),
        ("polygraphy.backend.trt", backend),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["polygraphy.backend"].trt = backend
    yield asked


def test_compare_feeds_every_network_within_its_profile(
    polygraphy: types.SimpleNamespace, built: tuple[Path, driver.BuildReport, list[str]]
) -> None:
    result = driver.compare(built[0])
    assert [row.name for row in result.networks] == list(parity.NETWORKS)
    warp = polygraphy.profiles[-1]
    assert warp[names.FEATURE_3D][0][0] == 1 and warp[names.FEATURE_3D][2][0] == 2
    assert warp[names.KP_DRIVING][0][0] == 1 and warp[names.KP_DRIVING][2][0] == 3
    assert result.networks[-1].parity["image_psnr_db"] > 45


def test_compare_fails_where_tensorrt_is_off(
    polygraphy: types.SimpleNamespace, built: tuple[Path, driver.BuildReport, list[str]]
) -> None:
    polygraphy.error = 0.1
    with pytest.raises(ExportError, match=r"TensorRT 8\.6\.1 differs from PyTorch: stitching delta_max"):
        driver.compare(built[0])


def test_compare_without_tensorrt_says_what_is_missing(
    built: tuple[Path, driver.BuildReport, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match="tensorrt") as raised:
        driver.compare(built[0])
    assert "tensorrt-cu13" in raised.value.remedy
