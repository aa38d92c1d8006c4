"""The committed code is what the pinned generator writes, and it runs on the oldest and the newest protobuf and gRPC."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lp_edge
from lp_edge.proto.generate import differences, generate, install

ROOT = Path(lp_edge.__file__).resolve().parent

# Run with other versions: every module loads, and both kinds of calls pass through a server.
SCRIPT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import version

import grpc

for name in sys.argv[1:]:
    import_module("lp_edge.proto.v1." + name)
from lp_edge.proto.v1 import animation_pb2, animation_pb2_grpc, server_pb2, server_pb2_grpc


class Info(server_pb2_grpc.ServerServiceServicer):
    def GetServerInfo(self, request, context):
        return server_pb2.GetServerInfoResponse(version="1.2.3", versions={"python": "3"})


class Animation(animation_pb2_grpc.AnimationServiceServicer):
    def Animate(self, requests, context):
        for request in requests:
            yield animation_pb2.AnimateResponse(frame=animation_pb2.AnimatedFrame(sequence=request.frame.sequence))


server = grpc.server(ThreadPoolExecutor(2))
server_pb2_grpc.add_ServerServiceServicer_to_server(Info(), server)
animation_pb2_grpc.add_AnimationServiceServicer_to_server(Animation(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    info = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=20)
    assert info.version == "1.2.3" and dict(info.versions) == {"python": "3"}, info
    frames = [animation_pb2.DrivingFrame(sequence=i) for i in (1, 2**63)]
    requests = iter([animation_pb2.AnimateRequest(frame=frame) for frame in frames])
    answers = animation_pb2_grpc.AnimationServiceStub(channel).Animate(requests, timeout=20)
    assert [answer.frame.sequence for answer in answers] == [1, 2**63]
server.stop(None).wait()
print(version("protobuf"), version("grpcio"))
"""


def unavailable(error: subprocess.CalledProcessError) -> None:
    """Skip where packages cannot be had; in CI only a Python that is too new for the old ones is an excuse."""
    if os.environ.get("CI") and sys.version_info < (3, 13):
        pytest.fail(f"{error.cmd}: {error.stderr}")
    pytest.skip(f"cannot be installed here: {error.stderr.strip().splitlines()[-1:]}")


def test_the_committed_code_is_what_the_generator_writes(tmp_path: Path) -> None:
    try:
        install(tmp_path / "packages")
    except subprocess.CalledProcessError as error:
        unavailable(error)
    (tmp_path / "out").mkdir()
    files = generate(tmp_path / "packages", tmp_path / "out")
    assert {"animation_pb2.py", "animation_pb2.pyi", "animation_pb2_grpc.py", "common_pb2.py"} <= files.keys()
    assert differences(files) == {}, "run python -m lp_edge.proto.generate"


def test_differences_are_told(tmp_path: Path) -> None:
    (tmp_path / "a_pb2.py").write_text("old")
    (tmp_path / "b_pb2.py").write_text("same")
    (tmp_path / "c_pb2.py").write_text("gone")
    found = differences({"a_pb2.py": "new", "b_pb2.py": "same", "d_pb2.pyi": "new"}, tmp_path)
    assert found == {"a_pb2.py": "changed", "c_pb2.py": "left over", "d_pb2.pyi": "missing"}


@pytest.mark.parametrize(
    ("packages", "versions"),
    [
        pytest.param(["protobuf==4.25.*", "grpcio==1.62.*"], r"4\.25\.\d+ 1\.62\.\d+", id="oldest"),
        pytest.param(["protobuf", "grpcio"], r"([7-9]|\d\d)\.[\d.]+ [\d.]+", id="newest"),
    ],
)
def test_the_code_runs(packages: list[str], versions: str, tmp_path: Path) -> None:
    target = tmp_path / "packages"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
    ]
    try:
        subprocess.run([*pip, "--target", str(target), *packages], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        unavailable(error)
    (target / "lp_edge").symlink_to(ROOT, target_is_directory=True)
    modules = sorted(path.stem for path in (ROOT / "proto" / "v1").glob("*_pb2*.py"))
    # -S: nothing of this environment is seen.
    command = [sys.executable, "-S", "-W", "error", "-c", SCRIPT, *modules]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(versions, done.stdout.strip()), done.stdout
