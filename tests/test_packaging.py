"""What is in the sdist and the wheel: the package, its data, nothing else."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lp_edge

ROOT = Path(lp_edge.__file__).resolve().parent
PACKAGES = (
    "client",
    "engines",
    "export",
    "export/liveportrait",
    "export/mesh",
    "export/networks",
    "export/quantize",
    "export/training",
    "proto",
    "proto/v1",
    "runtime",
    "runtime/server",
)
PROTOCOL = {"proto/lp_edge/v1": ".proto", "proto/v1": ".pyi"}
COMMANDS = {
    "lp-run": "lp_edge.cli:run",
    "lp-export": "lp_edge.cli:export",
    "lp-doctor": "lp_edge.cli:doctor",
    "lp-bench": "lp_edge.cli:bench",
    "lp-serve": "lp_edge.runtime.server.command:serve",
    "lp-client": "lp_edge.client.command:client",
}
DATA = ("engines/data", "runtime/data", "runtime/device_graphs")

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="no source tree: lp_edge is installed from a wheel"
)


def sources() -> list[Path]:
    """Files of the project that git would take, relative to the root."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
        found = [Path(name) for name in listed if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked sdist is no git repository
        skip = {".git", "build", "dist", ".venv", "__pycache__"}
        found = [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.parts)]
    return [p for p in found if (ROOT / p).is_file() and ".typeroot" not in p.parts]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the sdist, and the wheel that was built from that sdist."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("the package build is not installed (extra dev)")
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    for path in sources():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / path).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(tree)]
    try:
        if int(metadata.version("setuptools").split(".")[0]) >= 77:
            command.append("--no-isolation")  # works offline
    except metadata.PackageNotFoundError:
        pass
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    yield folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> list[str]:
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return archive.namelist()


def test_only_one_package_becomes_importable(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert len(tops) == 2
    assert "lp_edge" in tops
    assert any(top.endswith(".dist-info") for top in tops)


def test_the_wheel_holds_every_module_and_no_other(wheel: list[str]) -> None:
    wanted = {"lp_edge/__init__.py", "lp_edge/cli.py", "lp_edge/errors.py", "lp_edge/py.typed"}
    for package in PACKAGES:
        wanted |= {
            f"lp_edge/{path}"
            for path in map(str, sources())
            if path.endswith(".py") and str(Path(path).parent) == package
        }
    wanted |= protocol()
    modules = {name for name in wheel if name.startswith("lp_edge/") and not is_data(name)}
    assert modules == wanted


def is_data(name: str) -> bool:
    return name.startswith(tuple(f"lp_edge/{folder}/" for folder in DATA))


def protocol() -> set[str]:
    """The .proto files, which clients in other languages read, and the types of the generated code."""
    found = {f"lp_edge/{path}" for path in sources() if PROTOCOL.get(str(path.parent)) == path.suffix}
    assert {"lp_edge/proto/lp_edge/v1/common.proto", "lp_edge/proto/v1/common_pb2.pyi"} <= found
    return found


def test_the_wheel_holds_all_data(wheel: list[str]) -> None:
    wanted = {f"lp_edge/{path}" for path in sources() if any(path.is_relative_to(folder) for folder in DATA)}
    assert {name for name in wheel if is_data(name)} == wanted
    for name in (
        *("engines/data/mesh/manifest.json", "runtime/data/demo.jpg", "runtime/data/NOTICE.md"),
        "runtime/device_graphs/crop_512_halved.onnx",
    ):
        assert f"lp_edge/{name}" in wheel


def test_the_wheel_names_its_licence_and_commands(built: Path, wheel: list[str]) -> None:
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        info = next(name for name in wheel if name.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
        text = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        licence = next(name for name in wheel if name.startswith(info) and name.endswith("LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0" in text
    base = [
        line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert 0 < len(base) <= 10
    assert not [line for line in base if "torch" in line or "tensorrt" in line]
    lines = {line for line in scripts.splitlines() if "=" in line}
    assert lines == {f"{command} = {target}" for command, target in COMMANDS.items()}
    extras = {line.partition(": ")[2] for line in text.splitlines() if line.startswith("Provides-Extra:")}
    assert extras == {"client", "dev", "export", "gpu", "http", "nvcodec", "server", "tensorrt"}


def requirements(built: Path) -> dict[str, list[Requirement]]:
    """What the wheel asks for, by extra; "" = always."""
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = message_from_string(archive.read(name).decode())
    found: dict[str, list[Requirement]] = {
        "": [],
        **{extra: [] for extra in fields.get_all("Provides-Extra", [])},
    }
    for line in fields.get_all("Requires-Dist", []):
        entry = Requirement(line)
        extra = re.search(r'extra == "([\w-]+)"', str(entry.marker))
        found[extra[1] if extra else ""].append(entry)
    return found


def test_extras_have_lower_bounds_and_do_not_collide_with_the_base(built: Path) -> None:
    found = requirements(built)
    for extra, entries in found.items():
        for entry in entries:
            bounds = {spec.operator for spec in entry.specifier}
            assert entry.name == "lp-edge" or bounds == {">="}, f"{extra}: {entry}"
            assert not entry.extras or entry.extras <= set(found), f"{extra}: {entry}"
    # onnxruntime and onnxruntime-gpu write the same files: an extra that brings the second breaks both
    names = {entry.name for entries in found.values() for entry in entries}
    assert "onnxruntime" in names and "onnxruntime-gpu" not in names
    assert [entry.name for entry in found["gpu"]] == ["cuda-bindings"]
    assert {entry.name for entry in found["tensorrt"]} == {"lp-edge", "polygraphy"}


def test_extras_that_messages_and_documents_name_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("[project.optional-dependencies]") :].partition("[project.scripts]")[0]
    extras = set(re.findall(r"(?m)^([\w-]+) = \[", section))
    named = 0
    for path in sources():
        if path.suffix in {".py", ".md", ".toml", ".service"} or path.name.startswith("Dockerfile"):
            for match in re.finditer(r"lp-edge\[([a-z][a-z,-]*)\]", (ROOT / path).read_text()):
                named += 1
                assert set(match[1].split(",")) <= extras, f"{path} names {match[0]}"
    assert named > 10


def test_the_sdist_can_be_built_from_and_holds_no_foreign_files(built: Path) -> None:
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "engines/data/mesh/manifest.json"} <= names
    assert protocol() <= {f"lp_edge/{name}" for name in names}
    for name in names:
        assert not name.startswith(("build/", "dist/", ".venv", ".git/", "work/")), name
        assert "node_modules" not in name, name
        assert not name.endswith((".mp4", ".pth", ".pt")), name


def test_the_licence_is_the_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")
