"""Generate the Python code of the .proto files with the pinned generator: ``python -m lp_edge.proto.generate [--check]``.

The generator is older than the protobuf and gRPC that run the code, on purpose: what it writes loads on protobuf 4.25 and
everything newer, while newer generators refuse older runtimes. It gets a folder of its own, because it needs that old protobuf itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["GENERATOR", "differences", "generate", "install", "main"]

GENERATOR = "grpcio-tools==1.62.3"
"""The pinned generator; the code that it writes says so in its head (Protobuf Python Version 4.25.1)."""

_HERE = Path(__file__).resolve().parent
_STUBS = _HERE / "v1"


def install(folder: Path) -> None:
    """Install the generator into a folder that nothing else uses.

    Raises:
        subprocess.CalledProcessError: there is no pip, no network, or no wheel for this Python (there are some up to 3.12).
    """
    # Only wheels: compiling it takes many minutes. setuptools: the generator of that time imports pkg_resources.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
    ]
    command = [*pip, "--target", str(folder), GENERATOR, "setuptools<81"]
    subprocess.run(command, check=True, capture_output=True, text=True)


def generate(packages: Path, out: Path) -> dict[str, str]:
    """What ``proto/v1`` should hold.

    Args:
        packages: the folder of :func:`install`.
        out: an empty folder to work in.

    Returns:
        The generated files' text by name.

    Raises:
        subprocess.CalledProcessError: the generator refuses a file.
    """
    protos = sorted(str(p.relative_to(_HERE)) for p in (_HERE / "lp_edge").rglob("*.proto"))
    options = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    # -S: the packages of this environment, a newer protobuf among them, are not seen.
    command = [sys.executable, "-S", "-m", "grpc_tools.protoc", f"--proto_path={_HERE}", *options, *protos]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=_HERE, env=environment)
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


def differences(files: dict[str, str], folder: Path = _STUBS) -> dict[str, str]:
    """Which files of ``folder`` are not what the generator writes.

    Args:
        files: from :func:`generate`.
        folder: with the committed files.

    Returns:
        By name: ``left over``, ``missing`` or ``changed``; empty = all is as it should be.
    """
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*_pb2*")}
    found = {name: "left over" for name in sorted(present) if name not in files}
    for name, text in files.items():
        if present.get(name) != text:
            found[name] = "changed" if name in present else "missing"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with ``--check`` say which are not as the generator writes them (exit code 1)."""
    parser = argparse.ArgumentParser(description="Generate proto/v1 from proto/lp_edge/v1/*.proto.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args(argv).check
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out").mkdir()
        try:
            install(folder / "packages")
            files = generate(folder / "packages", folder / "out")
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(map(str, error.cmd))}\n{error.stderr}", file=sys.stderr)
            return 2
    found = differences(files)
    for name, state in found.items():
        print(
            f"proto/v1/{name} is {state}; {GENERATOR} writes it otherwise"
            if check
            else f"proto/v1/{name} was {state}"
        )
    if check:
        return 1 if found else 0
    for name in found:
        if name in files:
            (_STUBS / name).write_text(files[name], encoding="utf-8")
        else:
            (_STUBS / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
