"""What `import lp_edge` offers: every exported name, lazily, and the three lines of the README."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import lp_edge
from lp_edge.engines.backends import BackendConfig
from lp_edge.runtime.image import write_image


@pytest.mark.parametrize("name", lp_edge.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    value = getattr(lp_edge, name)
    assert value is getattr(lp_edge, name), "the second look-up must give the same object"
    assert name in dir(lp_edge)
    if name == "__version__":
        assert value == metadata.version("lp-edge")
    else:
        assert value.__name__ == name
        assert value.__doc__, f"{name} has no docstring"
        assert name in __import__(value.__module__, fromlist=["__all__"]).__all__


def test_names_are_sorted_and_match_what_type_checkers_see() -> None:
    assert lp_edge.__all__ == sorted(lp_edge.__all__)
    text = Path(lp_edge.__file__).read_text()
    typed = re.search(r"if TYPE_CHECKING:\n(.*?)\n__all__", text, re.DOTALL)
    assert typed is not None
    for name in lp_edge.__all__:
        if name not in vars(lp_edge.errors):
            assert re.search(rf"\b{name}\b", typed.group(1)), f"{name} is invisible to type checkers"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        lp_edge.no_such_name  # noqa: B018


def test_all_errors_are_exported_with_their_own_exit_codes() -> None:
    errors = [getattr(lp_edge, name) for name in lp_edge.errors.__all__]
    assert all(issubclass(e, lp_edge.LpEdgeError) for e in errors)
    top = [e for e in errors if e is not lp_edge.TensorError]  # an EngineError with its code
    codes = [e.exit_code for e in top]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


def test_importing_the_package_is_light() -> None:
    code = "import sys, lp_edge; print(sum(m in sys.modules for m in ('numpy', 'cv2', 'av', 'onnxruntime', 'rich')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_three_lines_animate_a_picture(toy_bundle: Path, tmp_path: Path) -> None:
    picture = np.zeros((120, 160, 3), np.uint8)
    picture[40:80, 60:100] = 255
    write_image(tmp_path / "portrait.png", picture)
    with lp_edge.Animator(toy_bundle, backend=BackendConfig("cpu", threads=1)) as animator:
        frames = [frame.rgb for frame in animator.animate(tmp_path / "portrait.png", "nod")]
    assert len(frames) == len(lp_edge.builtin_template("nod"))
    assert all(f.shape == picture.shape and f.dtype == np.uint8 for f in frames)
    assert any((f != picture).any() for f in frames)


def test_one_call_writes_a_file(toy_bundle: Path, tmp_path: Path) -> None:
    picture = np.zeros((120, 160, 3), np.uint8)
    picture[40:80, 60:100] = 255
    write_image(tmp_path / "portrait.png", picture)
    seen: list[int] = []
    result = lp_edge.animate(
        tmp_path / "portrait.png",
        lp_edge.builtin_template("nod", duration=1.0),
        tmp_path / "result.mp4",
        bundle=toy_bundle,
        backend=BackendConfig("cpu", threads=1),
        progress=lambda now: seen.append(now.frames),
    )
    assert result.output.is_file()
    assert seen == list(range(1, result.frames + 1))
