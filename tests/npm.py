"""npm for tests: installs what a folder's lock file pins, in a copy, so that nothing is left in the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_NO_NETWORK = re.compile(
    r"EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|ENOTFOUND|ETIMEDOUT|ERR_SOCKET_TIMEOUT"
)


def npm_ci(folder: Path, copy: Path, needs: str) -> Path:
    """Copy ``folder`` without its ``node_modules`` to ``copy`` and install there.

    Skips the test without npm or without a network; where ``CI`` is set a missing network fails.

    Args:
        folder: with ``package.json`` and ``package-lock.json``.
        copy: does not exist yet.
        needs: a path below ``node_modules`` that must be there afterwards: npm says nothing where it cannot fetch optional packages.

    Returns:
        The needed path.
    """
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("node_modules"))
    # No install scripts: nothing here needs them. No retries: without a network the answer should come within seconds.
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, timeout=200)
    needed = copy / "node_modules" / needs
    if done.returncode == 0 and needed.exists():
        return needed
    if not os.environ.get("CI") and (done.returncode == 0 or _NO_NETWORK.search(done.stderr)):
        pytest.skip("npm cannot reach its registry")
    pytest.fail(f"npm ci in {folder.name} brought no {needs}: {done.stderr[-2000:]}")


def lock_faults(folder: Path) -> list[str]:
    """What is wrong with the pins of ``package.json`` and ``package-lock.json``; empty = nothing.

    Versions are exact, and every package has a hash and no address: it comes from whatever registry npm is told to use, and must be
    that package (``.npmrc`` beside it keeps npm from writing addresses).
    """
    manifest = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    pins = {**manifest.get("dependencies", {}), **manifest.get("optionalDependencies", {})}
    faults = [
        f"{name}@{pin} is no exact version"
        for name, pin in pins.items()
        if not re.fullmatch(r"\d+\.\d+\.\d+", pin)
    ]
    packages = json.loads((folder / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    faults += [f"{name} is not locked" for name in pins if f"node_modules/{name}" not in packages]
    for path, package in packages.items():
        if path:
            if "resolved" in package:
                faults.append(f"{path} is tied to {package['resolved']}")
            if not package.get("integrity", "").startswith("sha512-"):
                faults.append(f"{path} has no hash")
    return faults
