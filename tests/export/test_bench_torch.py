"""The PyTorch side of lp-bench compare, with networks of the right shapes and next to no work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the export extra (torch) is not installed")

from lp_edge.engines import names
from lp_edge.errors import BackendUnavailable, ConfigError, ExportError
from lp_edge.export.bench_torch import _forward, _inputs, open_torch_side, torch_side
from lp_edge.export.liveportrait.graphs import GRAPHS
from lp_edge.runtime.bench_compare import Side, bench_compare


class Net(torch.nn.Module):  # type: ignore[misc]
    """Remembers what it was given and answers with what is told."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.seen = answer, []

    def forward(self, *given: Any) -> Any:
        self.seen.append(
            [
                (tuple(x.shape), x.dtype, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled())
                for x in given
            ]
        )
        return self.answer(*given)


@pytest.fixture
def networks() -> Any:
    return SimpleNamespace(
        appearance=Net(lambda x: x),
        motion=Net(lambda x: x),
        warping=Net(lambda f, s, d: {names.WARPED: f[:, :, 0, :2, :2]}),
        generator=Net(lambda x: torch.full((len(x), 3, 4, 4), 0.5)),
        stitching=Net(lambda x: x),
        retarget_eye=Net(lambda x: x),
        retarget_lip=Net(lambda x: x),
    )


def test_it_has_the_networks_of_the_family_under_the_names_of_the_graphs(networks: Any) -> None:
    side = torch_side(networks)
    assert sorted(side.networks) == sorted(GRAPHS)
    assert side.label == "torch eager"
    assert side.origin["torch"] == torch.__version__


def test_every_network_gets_inputs_of_the_graph_s_sizes(networks: Any) -> None:
    side = torch_side(networks)
    for name in side.networks:
        with side.open(name, 2) as call:
            assert call() is None
    assert networks.appearance.seen == [[((2, 3, 256, 256), torch.float32, False, True)]]
    assert networks.motion.seen == networks.appearance.seen
    volume, source, driving = networks.warping.seen[0]
    assert (volume[0], source[0], driving[0]) == ((2, 32, 16, 64, 64), (2, 21, 3), (2, 21, 3))
    assert networks.generator.seen[0][0][0] == (2, 32, 2, 2)
    for name, width in (("stitching", 126), ("retarget_eye", 66), ("retarget_lip", 65)):
        assert getattr(networks, name).seen[0][0][0] == (2, width)


def test_the_picture_leaves_as_bytes_like_the_graph_s(networks: Any) -> None:
    picture = _forward(networks, names.WARP_DECODE)(*_inputs(names.WARP_DECODE, 1, "cpu"))
    assert (picture.dtype, tuple(picture.shape), int(picture[0, 0, 0, 0])) == (torch.uint8, (1, 4, 4, 3), 127)


def test_half_is_autocast(networks: Any) -> None:
    side = torch_side(networks, half=True)
    before = torch.backends.cudnn.benchmark
    with side.open(names.STITCHING, 1) as call:
        call()
        assert torch.backends.cudnn.benchmark is True  # as LivePortrait measures itself
    assert torch.backends.cudnn.benchmark is before
    assert side.label == "torch eager fp16"
    assert networks.stitching.seen[0][0][2] is True


def test_compiled_networks_are_compiled_once(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, mode: compiled.append((mode, forward)) or forward)
    side = torch_side(networks, mode="compile")
    with side.open(names.STITCHING, 1) as call:
        call()
        call()
    assert compiled == [("max-autotune", networks.stitching)] and len(networks.stitching.seen) == 2


def test_it_is_a_side_of_a_comparison(networks: Any) -> None:
    one, two = torch_side(networks), torch_side(networks)
    (record,) = bench_compare(one, [two], networks=[names.STITCHING], rounds=2, warmup=0)
    assert isinstance(one, Side) and record["low"] <= record["ratio"] <= record["high"]
    assert len(networks.stitching.seen) == 8


def test_what_is_not_there_is_refused(networks: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="magic"):
        torch_side(networks, mode="magic")  # type: ignore[arg-type]
    with pytest.raises(ExportError):
        open_torch_side(tmp_path, "eager", gpu=False)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="sees no GPU"):
            open_torch_side(tmp_path, "eager", gpu=True)
