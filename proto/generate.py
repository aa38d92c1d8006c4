"""Generate the Python code of the .proto files with the pinned generator: ``python -m lp_edge.proto.generate [--check]``.

The generator is older than the protobuf and gRPC that run the code, on purpose: what it writes loads on protobuf 4.25 and
everything newer, while newer generators refuse older runtimes. It gets an environment of its own, because it needs that old protobuf itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

__all__ = ["GENERATOR", "generate", "main"]

GENERATOR = "grpcio-tools==1.62.3"
"""The pinned generator; the code that it writes says so in its head (Protobuf Python Version 4.25.1)."""

_HERE = Path(__file__).resolve().parent
_STUBS = _HERE / "v1"


def generate(folder: Path) -> dict[str, str]:
    """The generated files by name.

    Args:
        folder: an empty folder to work in.

    Raises:
        subprocess.CalledProcessError: the generator cannot be installed or refuses a file.
    """
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    # setuptools: the generator of that time imports pkg_resources
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", GENERATOR, "setuptools<81"]
    subprocess.run(install, check=True, capture_output=True, text=True)
    out = folder / "out"
    out.mkdir()
    protos = sorted(str(p.relative_to(_HERE)) for p in (_HERE / "lp_edge").rglob("*.proto"))
    options = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    command = [python, "-m", "grpc_tools.protoc", f"--proto_path={_HERE}", *options, *protos]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=_HERE)
    files = {}
    for path in sorted((out / "lp_edge" / "v1").iterdir()):
        text = path.read_text(encoding="utf-8")
        if path.name.endswith("_pb2_grpc.py") and "class " not in text:
            continue  # a file without services
        # The files lie in lp_edge.proto.v1: lp_edge.v1 is the name of the protocol's package, not of a Python package.
        text = text.replace("from lp_edge.v1 import", "from lp_edge.proto.v1 import")
        if path.name.endswith("_pb2.py"):
            text = text.replace(", 'lp_edge.v1.", ", 'lp_edge.proto.v1.")
        files[path.name] = text
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with ``--check`` say which are not as the generator writes them (exit code 1)."""
    parser = argparse.ArgumentParser(description="Generate proto/v1 from proto/lp_edge/v1/*.proto.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args(argv).check
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = generate(Path(folder))
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(map(str, error.cmd))}\n{error.stderr}", file=sys.stderr)
            return 2
    present = {p.name: p for p in _STUBS.glob("*_pb2*")}
    stale = sorted(name for name, p in present.items() if name not in files)
    changed = sorted(n for n, text in files.items() if n not in present or present[n].read_text("utf-8") != text)
    for name in [*stale, *changed]:
        print(f"proto/v1/{name} is {'left over' if name in stale else 'not what ' + GENERATOR + ' writes'}")
    if check:
        return 1 if stale or changed else 0
    for name in stale:
        present[name].unlink()
    for name in changed:
        (_STUBS / name).write_text(files[name], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
