"""What is in deploy/: the unit, the image, the health check and the options in them are real. No Docker engine is needed."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import pytest

import lp_edge
from lp_edge.runtime.server.command import serve
from lp_edge.runtime.server.config import ServerConfig

ROOT = Path(lp_edge.__file__).resolve().parent
DEPLOY = ROOT / "deploy"
SECONDS = 120.0

pytestmark = pytest.mark.skipif(
    not DEPLOY.is_dir(), reason="no source tree: lp_edge is installed from a wheel"
)


def commands(text: str) -> list[list[str]]:
    """The arguments of every lp-serve in a shell text (continued lines joined)."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = re.match(r"(?:lp-serve|docker run .*\slp-edge)(\s.*)?$", line.partition("  #")[0].rstrip())
        if match:
            found.append(shlex.split(match[1] or ""))
    return found


def parse(args: list[str]) -> click.Context:
    """Parse options as lp-serve does; fails for one that does not exist."""
    return serve.make_context("lp-serve", list(args))


# -- systemd -----------------------------------------------------------------------------------------------


@pytest.fixture
def unit() -> dict[str, list[str]]:
    """Every key of the unit with its values."""
    keys: dict[str, list[str]] = {}
    for line in (DEPLOY / "lp-serve.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            keys.setdefault(key, []).append(value)
    return keys


def test_the_unit_gives_the_server_time_and_restarts_only_what_helps(unit: dict[str, list[str]]) -> None:
    assert unit["Type"] == ["notify"]
    assert float(unit["TimeoutStopSec"][0]) >= ServerConfig.drain_timeout_s + 10
    # While it drains nobody tells the watchdog anything.
    assert float(unit["WatchdogSec"][0]) > ServerConfig.drain_timeout_s + 10
    assert unit["RestartPreventExitStatus"] == ["2 5 7"]
    program, options = unit["ExecStart"][0].split()
    assert Path(program).name == "lp-serve" and options == "$LP_SERVE_OPTIONS"


@pytest.fixture
def unit_file(tmp_path: Path) -> Path:
    """The unit with a program that is installed here."""
    text = (DEPLOY / "lp-serve.service").read_text()
    changed = re.sub(r"(?m)^(ExecStart=)\S+", rf"\g<1>{shutil.which('true')}", text)
    assert changed != text
    path = tmp_path / "lp-serve.service"
    path.write_text(changed)
    return path


def systemd_analyze(*args: str) -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run([program, *args], capture_output=True, text=True, timeout=SECONDS, check=False)
    if "Unknown command" in done.stderr or "unrecognized option" in done.stderr:
        pytest.skip(f"this systemd-analyze does not know {args[0]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_understands_the_unit(unit_file: Path) -> None:
    assert systemd_analyze("verify", str(unit_file)).strip() == "", "no warnings either"


def test_the_unit_is_closed(unit_file: Path) -> None:
    said = systemd_analyze("security", "--offline=yes", "--threshold=20", "--no-pager", str(unit_file))
    (exposure,) = re.findall(r"exposure level for \S+ ([0-9.]+)", said.replace(":", ""))
    stated = re.search(r"`systemd-analyze security`: ([0-9.]+) of 10", (DEPLOY / "README.md").read_text())
    assert stated is not None
    assert float(exposure) <= float(stated[1]) + 0.5  # other versions weigh differently


def test_options_of_the_environment_file_are_real() -> None:
    lines = (DEPLOY / "lp-serve.env.example").read_text().splitlines()
    options = [
        shlex.split(shlex.split(x.lstrip("#"))[0].partition("=")[2])
        for x in lines
        if "LP_SERVE_OPTIONS=" in x
    ]
    assert len(options) == 2
    first, second = (parse(args).params for args in options)
    assert first["listen"] == ServerConfig.listen
    assert second["tls_cert"] and second["token_file"] and not second["insecure"]
    set_here = [x for x in lines if x and not x.startswith("#")]
    assert len(set_here) == 1, "no token is set by the example"


# -- Docker --------------------------------------------------------------------------------------------------


@pytest.fixture
def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def copied(dockerfile: list[tuple[str, str]]) -> list[str]:
    """What is copied from the repository, relative to its root."""
    sources: list[str] = []
    for instruction, rest in dockerfile:
        if instruction == "COPY" and not rest.startswith("--from"):
            sources += [word.rstrip("/") for word in rest.split()[:-1]]
    return sources


def test_the_image_is_pinned_unprivileged_and_holds_no_secret(dockerfile: list[tuple[str, str]]) -> None:
    by_name = {name: [rest for other, rest in dockerfile if other == name] for name, _ in dockerfile}
    assert set(by_name) <= {
        *(
            "FROM",
            "WORKDIR",
            "RUN",
            "COPY",
            "ENV",
            "USER",
            "EXPOSE",
            "STOPSIGNAL",
            "HEALTHCHECK",
            "ENTRYPOINT",
        )
    }
    assert [rest.split()[0] for rest in by_name["FROM"]] == ["python:3.12-slim-bookworm"] * 2
    assert by_name["FROM"][0].endswith(" AS build")
    order = [name for name, _ in dockerfile]
    assert by_name["USER"] == ["10001:10001"]
    assert order.index("USER") < order.index("ENTRYPOINT") and "RUN" not in order[order.index("USER") :]
    assert by_name["EXPOSE"] == [ServerConfig.listen.rpartition(":")[2]]
    (program,) = json.loads(by_name["ENTRYPOINT"][0])
    scripts = (ROOT / "pyproject.toml").read_text()
    assert f'{program} = "lp_edge.runtime.server.command:serve"' in scripts
    assert not [
        word
        for word in ("token", "secret", "insecure", "password")
        if word in " ".join(by_name["ENV"]).lower()
    ]
    check = by_name["HEALTHCHECK"][0]
    words = json.loads(check[check.index("CMD") + 3 :])
    assert words == ["python", "/opt/lp-edge/health.py"]
    assert f"deploy/health.py {words[1]}" in by_name["COPY"]


def test_everything_that_is_copied_is_there_and_not_ignored(dockerfile: list[tuple[str, str]]) -> None:
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source
        last = [rule for rule in rules if fnmatch.fnmatch(source, rule.lstrip("!"))][-1]
        assert last.startswith("!"), f"{source} is not sent"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert sent == set(copied(dockerfile)), "nothing else is sent"


def test_what_is_copied_installs(dockerfile: list[tuple[str, str]], tmp_path: Path) -> None:
    """The wheel that pip would build in the image has every package and its data."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "src"
    source.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in copied(dockerfile):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
        else:
            (source / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [*(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    listed = re.search(r"(?s)packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    assert listed is not None
    for package in re.findall(r'"lp_edge\.?([\w.]*)"', listed[1]):
        assert str(Path("lp_edge", *package.split("."), "__init__.py")) in inside
    for name in (
        "runtime/server/command.py",
        "engines/data/mesh/manifest.json",
        "proto/lp_edge/v1/server.proto",
    ):
        assert f"lp_edge/{name}" in inside


# -- documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deploy/README.md", "docs/server.md"])
def test_commands_in_documents_are_real(name: str) -> None:
    blocks = re.findall(r"(?s)```sh\n(.*?)```", (ROOT / name).read_text())
    found = [args for block in blocks for args in commands(block)]
    assert len(found) >= 2, "the document shows how to start it"
    for args in found:
        parse(args)


def test_the_document_names_every_option() -> None:
    text = (ROOT / "docs" / "server.md").read_text()
    named = set(re.findall(r"--[a-z][a-z0-9-]+", text))
    options = {name for parameter in serve.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {name for name in options if name.startswith("--")} - named <= {
        "--help",
        "--version",
        "--no-reflection",
    }


def test_the_document_names_every_metric_and_every_label() -> None:
    pytest.importorskip("prometheus_client")
    pytest.importorskip("grpc")
    from lp_edge.runtime.server.metrics import Metrics

    metrics = Metrics()
    metrics.bind(queue_depth=int, portraits=int, portrait_bytes=int, streams=int)
    metrics.stream_closed("animate", "OK", 1.0)
    metrics.batch("warp_decode", 1, 1, 0.0, 0.0)
    real = set()
    for family in metrics.registry.collect():
        if family.name.startswith("lp_edge_"):
            labels = sorted({key for sample in family.samples for key in sample.labels} - {"le"})
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            real.add(f"{family.name}{suffix}" + (f"{{{','.join(labels)}}}" if labels else ""))
    text = (ROOT / "docs" / "server.md").read_text()
    assert set(re.findall(r"^\| `(lp_edge_[a-z_]+(?:\{[a-z,]+\})?)`", text, re.MULTILINE)) == real
