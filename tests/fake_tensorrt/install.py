"""A machine with a fake GPU and a fake TensorRT, for tests that open networks by ``BackendConfig("tensorrt")``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lp_edge.engines import cuda
from lp_edge.tests.fake_cuda.device import H200, FakeCuda, Personality
from lp_edge.tests.fake_tensorrt.module import World, make_tensorrt

_OPEN = cuda.open_cuda  # the real one, however many machines come one after the other


def install(
    monkeypatch: pytest.MonkeyPatch, cache: Path, version: str = "10.3", device: Personality = H200
) -> World:
    """Let ``import tensorrt`` and the CUDA that networks share be fakes for the rest of the test.

    Args:
        cache: where engines go whose network is no part of a bundle.
        version: of TensorRT; one of ``VERSIONS``.
        device: what the GPU is like.

    Returns:
        The machine; call its ``verify`` when everything is closed.
    """
    world = World(FakeCuda(device))
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(version, world))
    monkeypatch.setattr(cuda, "open_cuda", lambda device: _OPEN(device, runtime=world.cuda))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return world
