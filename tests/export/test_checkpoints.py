"""Reading checkpoints: every form that is accepted, and every refusal by name, on tiny stand-in networks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the export extra (torch) is not installed")

from lp_edge.errors import ExportError
from lp_edge.export import inventory
from lp_edge.export.checkpoints import load_networks, load_state, verified
from lp_edge.export.inventory import FILES, STITCHING_FILE, STITCHING_PARTS, UNVERIFIED, OfficialFile
from lp_edge.export.networks import LivePortraitNetworks, StitchingNetwork

ROLES = ("appearance", "motion", "warping", "generator", STITCHING_FILE)


def _block(inputs: int, outputs: int) -> torch.nn.Module:
    """A small network with parameters, buffers and an integer counter."""
    return torch.nn.Sequential(torch.nn.Conv2d(inputs, outputs, 3), torch.nn.BatchNorm2d(outputs))


def create() -> LivePortraitNetworks:
    return LivePortraitNetworks(
        appearance=_block(1, 2),
        motion=_block(2, 3),
        warping=_block(3, 4),
        generator=_block(4, 5),
        stitching=StitchingNetwork(6, 5, (4,)),
        retarget_eye=StitchingNetwork(4, 3, (2,)),
        retarget_lip=StitchingNetwork(3, 2, (4,)),
    )


def states(seed: int = 1) -> dict[str, dict[str, Any]]:
    """Role -> what its file holds."""
    torch.manual_seed(seed)
    made = create()
    result = {role: getattr(made, role).state_dict() for role in ROLES[:4]}
    result[STITCHING_FILE] = {
        part: getattr(made, name).state_dict() for name, part in STITCHING_PARTS.items()
    }
    return result


def write(root: Path, content: Mapping[str, Any], variant: inventory.Variant = "human") -> Path:
    for role, file in FILES[variant].items():
        if role in content:
            (root / file.path).parent.mkdir(parents=True, exist_ok=True)
            torch.save(content[role], root / file.path)
    return root


def path_of(root: Path, role: str) -> Path:
    return root / FILES["human"][role].path


def load(root: Path, **options: Any) -> tuple[LivePortraitNetworks, tuple[Any, ...]]:
    return load_networks(root, **{"allow_unverified": True, "create": create, **options})


def equal(networks: LivePortraitNetworks, wanted: Mapping[str, Any]) -> bool:
    flat = {role: wanted[role] for role in ROLES[:4]}
    flat.update({name: wanted[STITCHING_FILE][part] for name, part in STITCHING_PARTS.items()})
    return all(
        torch.equal(value, flat[role][key].to(value.dtype))
        for role in flat
        for key, value in getattr(networks, role).state_dict().items()
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "weights", states())


# -- what is accepted ---------------------------------------------------------------------------------


def test_every_network_gets_its_own_weights(root: Path) -> None:
    networks, entries = load(root)
    assert equal(networks, states())
    assert [e.name for e in entries] == [f.path for f in FILES["human"].values()]
    for entry in entries:
        assert entry.sha256 == hashlib.sha256((root / entry.name).read_bytes()).hexdigest()
        assert entry.licence == UNVERIFIED
    assert not verified(entries)
    assert not networks.warping.training
    assert not any(p.requires_grad for p in networks.generator.parameters())


def test_official_files_carry_their_licence(root: Path) -> None:
    official = {
        role: OfficialFile(f.path, hashlib.sha256((root / f.path).read_bytes()).hexdigest(), None)
        for role, f in FILES["human"].items()
    }
    networks, entries = load(root, files=official, allow_unverified=False)
    assert equal(networks, states())
    assert verified(entries) and {e.licence for e in entries} == {"MIT"}


def test_an_allowed_file_is_named_in_the_log(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lp_edge"):
        load(root)
    assert sum("is not the official file" in r.message for r in caplog.records) == 5


@pytest.mark.parametrize("inside", ["liveportrait", "flat"])
def test_the_folder_may_be_the_inner_one_or_flat(inside: str, root: Path, tmp_path: Path) -> None:
    folder = root / "liveportrait"
    if inside == "flat":
        folder = tmp_path / "flat"
        folder.mkdir()
        for file in FILES["human"].values():
            (root / file.path).rename(folder / file.name)
    assert equal(load(folder)[0], states())


@pytest.mark.parametrize("inside", ["", "liveportrait_animals"])
def test_animals_take_the_human_stitching_module(inside: str, root: Path) -> None:
    animal = {role: state for role, state in states(2).items() if role != STITCHING_FILE}
    write(root, animal, "animal")
    networks, entries = load(root / inside, variant="animal")
    assert equal(networks, {**animal, STITCHING_FILE: states()[STITCHING_FILE]})
    assert [e.name for e in entries] == [f.path for f in FILES["animal"].values()]


def _prefixed(state: dict[str, Any]) -> dict[str, Any]:
    return {f"module.{k}": v for k, v in state.items()}


ACCEPTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ddp_prefix": _prefixed,
    "compiled_ddp": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "twice_the_same": lambda s: {**s, **_prefixed(s)},
    "nested": lambda s: {"state_dict": s, "epoch": 3, "config": {"name": "x", "rates": [1.0]}},
    "deeply_nested": lambda s: {"model": {"net": {"params": _prefixed(s)}}},
    "beside_an_optimiser": lambda s: {
        "model": s,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]},
        "step": torch.tensor(7),
    },
    "a_whole_training_run": lambda s: {**states(5), "motion": s},
    "parameters": lambda s: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_unambiguous_forms_are_accepted(form: str, root: Path) -> None:
    state = states()["motion"]
    torch.save(ACCEPTED[form](state), path_of(root, "motion"))
    assert equal(load(root)[0], states())


@pytest.mark.parametrize("form", ["prefix", "flat", "flat_prefix", "nested", "with_optimisers"])
def test_forms_of_the_stitching_file(form: str, root: Path) -> None:
    parts = states()[STITCHING_FILE]
    flat = {f"{part}.{k}": v for part, state in parts.items() for k, v in state.items()}
    torch.save(
        {
            "prefix": {part: _prefixed(state) for part, state in parts.items()},
            "flat": flat,
            "flat_prefix": _prefixed(flat),
            "nested": {"state_dict": parts, "epoch": 1},
            "with_optimisers": {**parts, "optim": {"state": {0: {"m": torch.ones(1)}}, "param_groups": []}},
        }[form],
        path_of(root, STITCHING_FILE),
    )
    assert equal(load(root)[0], states())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype: torch.dtype, root: Path) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in states()["warping"].items()}
    torch.save(state, path_of(root, "warping"))
    networks, _ = load(root)
    assert all(p.dtype == torch.float32 for p in networks.warping.parameters())
    assert equal(networks, {**states(), "warping": state})


def test_the_old_file_format_is_read(root: Path) -> None:
    torch.save(states()["motion"], path_of(root, "motion"), _use_new_zipfile_serialization=False)
    assert equal(load(root)[0], states())


def _shard(root: Path, count: int = 2, role: str = "generator") -> list[Path]:
    state = states()[role]
    place = path_of(root, role)
    place.unlink()
    keys = sorted(state)
    paths = []
    for i in range(count):
        paths.append(place.with_name(f"{place.stem}-{i + 1:05}-of-{count:05}.pth"))
        torch.save({k: state[k] for k in keys[i::count]}, paths[-1])
    return paths


def test_shards_are_put_together(root: Path) -> None:
    paths = _shard(root, 3)
    networks, entries = load(root)
    assert equal(networks, states())
    assert [e.name for e in entries if "generator" in e.name] == [
        f"liveportrait/base_models/{p.name}" for p in paths
    ]


def test_the_synthetic_set_in_the_official_layout(shared: Path, tmp_path: Path) -> None:
    """The stitching file at full size, as the official one is nested."""
    material = shared / "liveportrait" / "make_checkpoints.py"
    module = runpy.run_path(str(material))
    relative = "retargeting_models/stitching_retargeting_module.pth"
    parts = json.loads((material.parent / "state_dicts.json").read_text())[relative]
    content = {part: module["fill"](f"{relative}/{part}", table) for part, table in parts.items()}
    path = tmp_path / "s.pth"
    torch.save(content, path)
    full = {
        "stitching": StitchingNetwork(126, 65, (128, 128, 64)),
        "retarget_eye": StitchingNetwork(66, 63, (256, 256, 128, 128, 64)),
        "retarget_lip": StitchingNetwork(65, 63, (128, 128, 64)),
    }
    tables = {name: network.state_dict() for name, network in full.items()}
    got = load_state([path], STITCHING_FILE, tables, parts=STITCHING_PARTS)
    for name, part in STITCHING_PARTS.items():
        full[name].load_state_dict(got[name])
        assert all(torch.equal(got[name][k], content[part][k]) for k in content[part])


# -- what is refused ------------------------------------------------------------------------------------


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def _change(role: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        torch.save(change(states()[role]), path_of(root, role))

    return apply


def _bytes(role: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path_of(root, role).write_bytes(change(path_of(root, role).read_bytes()))

    return apply


def _evil(root: Path) -> None:
    torch.save({**states()["motion"], "x": _Evil(root / "executed")}, path_of(root, "motion"))


def _evil_plain(root: Path) -> None:
    path_of(root, "motion").write_bytes(pickle.dumps(_Evil(root / "executed"), protocol=2))


def _evil_old(root: Path) -> None:
    torch.save(_Evil(root / "executed"), path_of(root, "motion"), _use_new_zipfile_serialization=False)


def _whole_module(root: Path) -> None:
    torch.save(create().motion, path_of(root, "motion"))


def _swapped(root: Path) -> None:
    warping = path_of(root, "warping").read_bytes()
    path_of(root, "generator").write_bytes(warping)


def _lost_shard(root: Path) -> None:
    _shard(root)[1].unlink()


def _two_counts(root: Path) -> None:
    path = _shard(root)[1]
    path.rename(path.with_name(path.name.replace("of-00002", "of-00003")))


def _surplus_shard(root: Path) -> None:
    path = _shard(root)[1]
    path.with_name(path.name.replace("-00002-of", "-00003-of")).write_bytes(path.read_bytes())


def _shards_and_file(root: Path) -> None:
    whole = path_of(root, "generator").read_bytes()
    _shard(root)
    path_of(root, "generator").write_bytes(whole)


def _overlapping_shards(root: Path) -> None:
    paths = _shard(root)
    both = {**torch.load(paths[0]), **torch.load(paths[1])}
    torch.save(both, paths[1])


def _twice(root: Path) -> None:
    write(root / "liveportrait", {})
    inner = path_of(root, "motion")
    (root / inner.name).write_bytes(inner.read_bytes())


def _set(key: str, value: float) -> Callable[[dict[str, Any]], Any]:
    def change(state: dict[str, Any]) -> Any:
        state[key].view(-1)[1] = value
        return state

    return change


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda s: {k: v for k, v in s.items() if k != key}


def _parts(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return _change(STITCHING_FILE, change)


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # name: (what is done to a sound set, which file the message names, what else it says)
    "missing_file": (lambda r: path_of(r, "warping").unlink(), "warping_module.pth", "has no"),
    "missing_key": (_change("motion", _without("0.bias")), "motion_extractor.pth", "lacks 0.bias"),
    "extra_key": (
        _change("motion", lambda s: {**s, "2.weight": torch.ones(3)}),
        "motion_extractor.pth",
        "extra 2.weight",
    ),
    "wrong_shape": (
        _change("warping", lambda s: {**s, "0.bias": torch.zeros(9)}),
        "warping_module.pth",
        "0.bias has the shape [9] instead of [4]",
    ),
    "transposed": (
        _change("warping", lambda s: {**s, "0.weight": s["0.weight"].transpose(0, 1)}),
        "warping_module.pth",
        "0.weight has the shape [3, 4, 3, 3] instead of [4, 3, 3, 3]",
    ),
    "nan": (_change("generator", _set("0.weight", float("nan"))), "spade_generator.pth", "0.weight holds 1"),
    "infinity": (
        _change("generator", _set("1.running_var", float("inf"))),
        "spade_generator.pth",
        "infinite",
    ),
    "beyond_fp32": (
        _change("generator", lambda s: {**s, "0.bias": torch.full((5,), 1e300, dtype=torch.float64)}),
        "spade_generator.pth",
        "0.bias holds 5",
    ),
    "integers": (
        _change("motion", lambda s: {**s, "0.bias": torch.ones(3, dtype=torch.int8)}),
        "motion_extractor.pth",
        "int8",
    ),
    "complex": (
        _change("motion", lambda s: {**s, "0.bias": torch.ones(3, dtype=torch.complex64)}),
        "motion_extractor.pth",
        "complex64",
    ),
    "sparse": (
        _change("motion", lambda s: {**s, "0.bias": torch.ones(3).to_sparse()}),
        "motion_extractor.pth",
        "sparse",
    ),
    "two_state_dicts": (
        _change("motion", lambda s: {"model": s, "ema": s}),
        "motion_extractor.pth",
        "2 times, at 'model', 'ema'",
    ),
    "prefixed_and_other": (
        _change("motion", lambda s: {**s, "module.0.bias": s["0.bias"] + 1}),
        "motion_extractor.pth",
        "0.bias twice",
    ),
    "truncated": (_bytes("generator", lambda b: b[: len(b) // 2]), "spade_generator.pth", "truncated"),
    "truncated_a_little": (_bytes("generator", lambda b: b[:-30]), "spade_generator.pth", "truncated"),
    "empty": (_bytes("generator", lambda b: b""), "spade_generator.pth", "is empty"),
    "text": (_bytes("generator", lambda b: b"<html>404</html>"), "spade_generator.pth", "not a checkpoint"),
    "pointer": (
        _bytes("motion", lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "motion_extractor.pth",
        "git lfs pull",
    ),
    "altered_inside": (
        _bytes("motion", lambda b: b.replace(b"data.pkl", b"date.pkl")),
        "motion_extractor.pth",
        "damaged",
    ),
    "code": (_evil, "motion_extractor.pth", "system"),
    "code_plain_pickle": (_evil_plain, "motion_extractor.pth", "were not run"),
    "code_old_format": (_evil_old, "motion_extractor.pth", "were not run"),
    "whole_module": (_whole_module, "motion_extractor.pth", "Sequential"),
    "a_tensor": (_change("motion", lambda s: s["0.bias"]), "motion_extractor.pth", "holds a Tensor"),
    "a_list": (_change("motion", lambda s: list(s.values())), "motion_extractor.pth", "holds a list"),
    "nothing": (_change("motion", lambda s: {}), "motion_extractor.pth", "lacks 0.bias"),
    "mixed_up": (_swapped, "spade_generator.pth", "holds the warping network; expected the generator"),
    "base_as_stitching": (
        lambda r: torch.save(states()["motion"], path_of(r, STITCHING_FILE)),
        "stitching_retargeting_module.pth",
        "holds the motion network",
    ),
    "stitching_lacks_a_part": (
        _parts(_without("retarget_mouth")),
        "stitching_retargeting_module.pth",
        "no part 'retarget_mouth'",
    ),
    "stitching_has_a_part_more": (
        _parts(lambda s: {**s, "retarget_nose": s["retarget_eye"]}),
        "stitching_retargeting_module.pth",
        "extra part 'retarget_nose'",
    ),
    "stitching_parts_swapped": (
        _parts(lambda s: {**s, "retarget_eye": s["retarget_mouth"]}),
        "stitching_retargeting_module.pth",
        "part retarget_eye holds the retarget_lip network",
    ),
    "stitching_part_incomplete": (
        _parts(lambda s: {**s, "retarget_eye": _without("mlp.0.bias")(s["retarget_eye"])}),
        "stitching_retargeting_module.pth",
        "part retarget_eye: lacks mlp.0.bias",
    ),
    "shard_missing": (_lost_shard, "spade_generator", "lacks shard 2 of 2"),
    "shards_of_two_sets": (_two_counts, "spade_generator", "several forms"),
    "shards_surplus": (_surplus_shard, "spade_generator", "numbered [1, 2, 3]"),
    "shards_and_file": (_shards_and_file, "spade_generator.pth", "several forms"),
    "shards_overlap": (_overlapping_shards, "spade_generator", "another shard holds too"),
    "two_copies": (_twice, "motion_extractor.pth", "2 times"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_weights_are_refused_by_name(case: str, root: Path) -> None:
    damage, name, words = REFUSED[case]
    damage(root)
    with pytest.raises(ExportError) as raised:
        load(root)
    message = str(raised.value)
    assert name in message and words in message, message
    assert raised.value.remedy
    assert not (root / "executed").exists()


def test_code_would_run_if_it_were_let(root: Path) -> None:
    """The mark of the cases above is a real one."""
    _evil(root)
    torch.load(path_of(root, "motion"), weights_only=False)
    assert (root / "executed").exists()


def test_a_file_that_is_not_official_is_not_even_parsed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr("lp_edge.export.checkpoints.torch.load", parse)
    with pytest.raises(ExportError, match="official file") as raised:
        load(root, allow_unverified=False)
    assert "appearance_feature_extractor.pth" in raised.value.got
    assert FILES["human"]["appearance"].sha256[:16] in raised.value.expected
    assert "--allow-unverified" in raised.value.remedy


def test_an_official_file_of_another_place_is_a_mix_up_whatever_is_allowed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The animal generator among the human files: same names, same shapes, told apart by its hash."""
    digest = hashlib.sha256(path_of(root, "generator").read_bytes()).hexdigest()
    animal = OfficialFile(FILES["animal"]["generator"].path, digest, None)
    monkeypatch.setattr(inventory, "FILES", {**FILES, "animal": {**FILES["animal"], "generator": animal}})
    with pytest.raises(ExportError) as raised:
        load(root, allow_unverified=True)
    assert "liveportrait_animals/base_models_v1.1/spade_generator.pth" in raised.value.got
    assert "liveportrait/base_models/spade_generator.pth for the variant human" in raised.value.expected


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a folder"):
        load(tmp_path / "nowhere")


def test_animals_need_the_animal_files(root: Path) -> None:
    with pytest.raises(ExportError, match="liveportrait_animals/base_models_v1"):
        load(root, variant="animal")
