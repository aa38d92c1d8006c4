"""Packs what a GPU machine without a network needs into pieces of bounded size; unpack.sh joins and installs them there.

    python benchmarks/gpu/pack.py --out DIR project [--bundle BUNDLE ...] [--include FILE ...]
    python benchmarks/gpu/pack.py --out DIR tensorrt85 --python PREFIX
    python benchmarks/gpu/pack.py --out DIR onnxruntime-gpu [--python-version 3.12]
    python benchmarks/gpu/pack.py --out DIR pyav [--python-version 3.12]

Each set becomes DIR/SET/: SET.tar.xz.000, .001 …, SHA256SUMS and unpack.sh. `--python` is the folder of a CPython 3.10
(TensorRT 8.5 has no wheels for newer ones), such as one made by pyenv; tests, caches and static libraries are left out.
Wheels come from pip's own index. Only Linux on x86-64.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
UNPACK = HERE / "unpack.sh"
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
# What lp-edge imports in these measurements.
COMMON = ("av", "click", "onnx", "rich")


@dataclass(frozen=True)
class Wheels:
    """What a set installs.

    Attributes:
        python: version of the interpreter that will import it.
        whole: with all they depend on.
        alone: without; what they ask for is not needed, or there already.
    """

    python: str
    whole: tuple[str, ...]
    alone: tuple[str, ...]


TENSORRT85 = Wheels(
    "3.10", (*COMMON, "numpy", "onnxruntime", "opencv-python-headless"), ("tensorrt==8.5.3.1",)
)
ONNXRUNTIME_GPU = Wheels("3.12", ("av", "flatbuffers"), ("onnxruntime-gpu==1.31.1",))
PYAV = Wheels("3.12", ("av",), ())

# Not needed to run a network, and large.
LEFT_OUT = re.compile(
    r"(^|/)(__pycache__|test|tests|idlelib|turtledemo|ensurepip|tkinter|lib2to3|share|include|config-3[^/]*-linux[^/]*)(/|$)"
    r"|\.(a|pyc|whl)$|libnvparsers_static|libonnxruntime_providers_tensorrt"
)


def say(line: str) -> None:
    print(f"pack: {line}", file=sys.stderr, flush=True)


def run(*command: str | Path) -> str:
    """Output of a command; ends with its words where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pack: {' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


# -- sets -----------------------------------------------------------------------------------------------------


def install(wheels: Wheels, site: Path) -> None:
    """Put wheels for another interpreter into a folder."""
    for packages, extra in ((wheels.whole, ()), (wheels.alone, ("--no-deps",))):
        if not packages:
            continue
        say(f"installing {', '.join(packages)} for Python {wheels.python}")
        run(
            *(
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-compile",
                "--disable-pip-version-check",
            ),
            *("--target", site, "--upgrade", "--only-binary=:all:", "--implementation", "cp"),
            *("--python-version", wheels.python, *extra),
            *(part for platform in PLATFORMS for part in ("--platform", platform)),
            *packages,
        )


def stand_ins(library: Path, folder: Path) -> None:
    """Empty cuBLAS and cuDNN: TensorRT's plugins do not load without them, and no plugin is used here.

    Every function answers 1, which is an error in both. With tactics of cuBLAS and cuDNN switched off nothing calls them.
    """
    wanted: dict[str, list[str]] = {}
    for line in run("nm", "-D", "--undefined-only", library).splitlines():
        if match := re.fullmatch(r"\s*U (\w+)@+(lib(?:cublas|cublasLt|cudnn)\.so\.\d+)", line):
            wanted.setdefault(match[2], []).append(match[1])
    folder.mkdir(parents=True)
    for name, functions in wanted.items():
        with tempfile.TemporaryDirectory() as work:
            code, versions = Path(work) / "stand_in.c", Path(work) / "versions"
            code.write_text("".join(f"int {function}(void) {{ return 1; }}\n" for function in functions))
            versions.write_text(f"{name} {{ global: {' '.join(f'{f};' for f in functions)} local: *; }};\n")
            run(
                *("gcc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}"),
                *(f"-Wl,--version-script={versions}", code, "-o", folder / name),
            )
        say(f"{name}: {len(functions)} functions stood in for")


def pack_project(options: argparse.Namespace, root: Path) -> None:
    """The working tree, bundles and further files."""
    names = run("git", "-C", PROJECT, "ls-files", "-co", "--exclude-standard", "-z").split("\0")
    for name in filter(None, names):
        source = PROJECT / name
        if source.is_file() and not source.is_symlink():
            target = root / "project" / "lp_edge" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for bundle in options.bundle:
        shutil.copytree(
            bundle, root / "bundles" / bundle.name, ignore=shutil.ignore_patterns("*.engine", "*.plan")
        )
    for file in options.include:
        (root / "files").mkdir(exist_ok=True)
        shutil.copy2(file, root / "files" / file.name)


def pack_tensorrt85(options: argparse.Namespace, root: Path) -> None:
    """CPython 3.10, TensorRT 8.5 and what lp-edge imports."""
    if options.python is None or not (options.python / "bin" / "python3.10").is_file():
        sys.exit(
            "pack: tensorrt85 needs --python PREFIX, the folder of a CPython 3.10 (PREFIX/bin/python3.10)"
        )
    home = root / "tensorrt85"
    shutil.copytree(
        options.python,
        home / "python",
        symlinks=True,
        ignore=lambda folder, names: ["site-packages"] if "site-packages" in names else [],
    )
    install(TENSORRT85, home / "site")
    stand_ins(home / "site" / "tensorrt" / "libnvinfer_plugin.so.8", home / "stand_ins")
    strip(home)


def pack_wheels(name: str, wheels: Wheels) -> Callable[[argparse.Namespace, Path], None]:
    """Makes a set of wheels for an interpreter that the machine has."""

    def pack(options: argparse.Namespace, root: Path) -> None:
        install(Wheels(options.python_version, wheels.whole, wheels.alone), root / name / "site")
        strip(root / name)

    return pack


def strip(home: Path) -> None:
    """Remove what is left out."""
    for path in sorted(home.rglob("*"), reverse=True):
        if LEFT_OUT.search(path.relative_to(home).as_posix()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.exists() or path.is_symlink():
                path.unlink()


SETS: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "project": pack_project,
    "tensorrt85": pack_tensorrt85,
    "onnxruntime-gpu": pack_wheels("onnxruntime-gpu", ONNXRUNTIME_GPU),
    "pyav": pack_wheels("pyav", PYAV),
}


# -- pieces -----------------------------------------------------------------------------------------------------


class Pieces:
    """A file to write into that goes on in the next piece where one is full."""

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        self.folder, self.name, self.limit = folder, name, limit
        self.sums: list[tuple[str, int, str]] = []
        self._file: IO[bytes] | None = None
        self._size, self._hash = 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            if self._file is None:
                self._path = self.folder / f"{self.name}.{len(self.sums):03d}"
                self._file, self._size, self._hash = self._path.open("wb"), 0, hashlib.sha256()
            part = view[: self.limit - self._size]
            self._file.write(part)
            self._hash.update(part)
            self._size += len(part)
            view = view[len(part) :]
            if self._size == self.limit:
                self.close()
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.sums.append((self._path.name, self._size, self._hash.hexdigest()))


def pieces_of(root: Path, out: Path, name: str, limit: int, preset: int) -> list[tuple[str, int, str]]:
    """Pack a folder; names, sizes and digests of the pieces."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pieces = Pieces(out, f"{name}.tar.xz", limit)
    collect = ("tar", "-C", str(root), "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "-c", ".")
    with (
        subprocess.Popen(collect, stdout=subprocess.PIPE) as tar,
        subprocess.Popen(
            ("xz", "-c", f"-{preset}", "-T0"), stdin=tar.stdout, stdout=subprocess.PIPE
        ) as compress,
    ):
        if tar.stdout is None or compress.stdout is None:
            sys.exit("pack: no pipes")
        tar.stdout.close()  # xz alone reads it
        while block := compress.stdout.read(1 << 20):
            pieces.write(block)
        pieces.close()
    if tar.returncode or compress.returncode:
        sys.exit("pack: tar or xz failed")
    (out / "SHA256SUMS").write_text("".join(f"{digest}  {piece}\n" for piece, _, digest in pieces.sums))
    shutil.copy2(UNPACK, out / UNPACK.name)
    return pieces.sums


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, collect, pack, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="+", choices=list(SETS), metavar="SET", help=", ".join(SETS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="may be repeated")
    parser.add_argument("--include", type=Path, action="append", default=[], help="a file; may be repeated")
    parser.add_argument("--python", type=Path, help="folder of a CPython 3.10")
    parser.add_argument(
        "--python-version", default=ONNXRUNTIME_GPU.python, help="of the machine's own interpreter"
    )
    parser.add_argument("--piece-mb", type=float, default=60.0, help="largest piece, in 10^6 bytes")
    parser.add_argument("--preset", type=int, default=6, choices=range(10), help="of xz")
    options = parser.parse_args(arguments)
    if not 0.001 <= options.piece_mb <= 10_000:
        parser.error("--piece-mb: expected 0.001 to 10000")
    if lost := [path for path in options.bundle if not path.is_dir()]:
        parser.error(f"--bundle {lost[0]}: there is no such folder")
    if lost := [path for path in options.include if not path.is_file()]:
        parser.error(f"--include {lost[0]}: there is no such file")
    for name in options.sets:
        with tempfile.TemporaryDirectory(prefix="lp-pack-") as folder:
            root = Path(folder)
            SETS[name](options, root)
            sums = pieces_of(root, options.out / name, name, int(options.piece_mb * 1e6), options.preset)
        told = {
            "set": name,
            "pieces": len(sums),
            "bytes": sum(size for _, size, _ in sums),
            "folder": str(options.out / name),
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
