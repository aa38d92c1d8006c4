"""What is in deploy/: the unit, the image, the health check and the options in them are real. No Docker engine is needed."""

from __future__ import annotations

import fnmatch
import json
import os
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
        line = line.partition("  #")[0].rstrip()
        if "--entrypoint" in line:
            continue
        match = re.match(r"(?:lp-serve|docker run .*\slp-edge(?:-gpu|-l4t)?)(\s.*)?$", line)
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

IMAGES = ("Dockerfile", "Dockerfile.gpu", "Dockerfile.l4t", "Dockerfile.l4t-jetpack5")
INSTRUCTIONS = {
    *("FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN"),
    *("USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"),
}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile and their arguments, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    words = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in words]


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> Path:
    return DEPLOY / str(request.param)


def stages(image: Path) -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage; the last one is ""; what stands before the first is "args"."""
    found: dict[str, list[tuple[str, str]]] = {"args": []}
    current = found["args"]
    for name, rest in instructions(image):
        if name == "FROM":
            current = found.setdefault(rest.partition(" AS ")[2], [])
        current.append((name, rest))
    return found


def arguments(image: Path) -> dict[str, str]:
    """Build arguments and their defaults."""
    pairs = [rest.partition("=") for name, rest in instructions(image) if name == "ARG"]
    return {name: value for name, _, value in pairs}


def copied(image: Path) -> list[str]:
    """What is copied from the repository, relative to its root."""
    sources: list[str] = []
    for instruction, rest in instructions(image):
        if instruction == "COPY" and not rest.startswith("--from"):
            sources += [word.rstrip("/") for word in rest.split()[:-1]]
    return sources


def test_every_image_is_tested() -> None:
    found = {path.name for path in DEPLOY.glob("Dockerfile*") if path.suffix != ".dockerignore"}
    assert found == set(IMAGES)
    text = (DEPLOY / "README.md").read_text()
    assert not [name for name in IMAGES if f"`{name}`" not in text]


def test_images_are_pinned_and_hold_no_secret(image: Path) -> None:
    assert image.read_text().startswith("# syntax=docker/dockerfile:1\n")
    assert {name for name, _ in instructions(image)} <= INSTRUCTIONS
    args, known = arguments(image), {"scratch"}
    for name, rest in instructions(image):
        if name != "FROM":
            continue
        base, _, stage = rest.partition(" AS ")
        if reference := re.fullmatch(r"\$\{(\w+)\}", base):
            base = args[reference[1]]
        assert base in known or re.search(r":[\w.-]*\d+\.\d+[\w.-]*$", base), f"{base} is not pinned"
        assert "latest" not in base
        known.add(stage)
    for name in args:
        assert len(re.findall(rf"\$\{{{name}\}}", image.read_text())) >= 1, f"{name} is not used"
    for name in re.findall(r"\$\{(\w+)\}", image.read_text()):
        assert name in args, f"{name} is not declared"
    for name, value in args.items():
        assert not value or re.search(r"\d", value), f"{name}={value} is not pinned"
    for source in re.findall(r"from=(\w+)", " ".join(rest for _, rest in instructions(image))):
        assert source in known, f"there is no stage {source}"
    words = " ".join(rest for name, rest in instructions(image) if name in ("ENV", "ARG")).lower()
    assert not [word for word in ("token", "secret", "insecure", "password") if word in words]


def test_arguments_are_seen_where_they_are_used(image: Path) -> None:
    """An ARG before the first FROM counts in FROM lines only, one of a stage in that stage only."""
    found = stages(image)
    outer = {rest.partition("=")[0] for name, rest in found.pop("args") if name == "ARG"}
    for stage in found.values():
        inner: set[str] = set()
        for name, rest in stage:
            if name == "ARG":
                inner.add(rest.partition("=")[0])
            used = set(re.findall(r"\$\{(\w+)\}", rest))
            assert used <= (outer if name == "FROM" else inner), f"{name} {rest}"


def test_images_serve_without_privileges(image: Path) -> None:
    last = stages(image)[""]
    by_name = {name: [rest for other, rest in last if other == name] for name, _ in last}
    order = [name for name, _ in last]
    (user,) = by_name["USER"]
    assert user.split(":")[0] == "10001"
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert not {"RUN", "COPY"} & set(order[order.index("USER") :])
    assert any("useradd" in rest and "--uid 10001" in rest for rest in by_name["RUN"])
    assert by_name["EXPOSE"] == [ServerConfig.listen.rpartition(":")[2]] and by_name["STOPSIGNAL"] == [
        "SIGTERM"
    ]
    (program,) = json.loads(by_name["ENTRYPOINT"][0])
    assert f'{program} = "lp_edge.runtime.server.command:serve"' in (ROOT / "pyproject.toml").read_text()
    (check,) = by_name["HEALTHCHECK"]
    words = json.loads(check[check.index("CMD") + 3 :])
    assert words == ["python", "/opt/lp-edge/health.py"]
    assert f"deploy/health.py {words[1]}" in by_name["COPY"]
    (environment,) = by_name["ENV"]
    assert "PATH=/opt/lp-edge/bin:$PATH" in environment
    if image.name != "Dockerfile":
        cache = re.search(r"XDG_CACHE_HOME=(\S+)", environment)
        assert cache and any(f"--owner 10001 --group lp-edge {cache[1]}" in rest for rest in by_name["RUN"])
        assert "NVIDIA_VISIBLE_DEVICES=all" in environment and "NVIDIA_DRIVER_CAPABILITIES=" in environment
        assert f":{cache[1]} " in (DEPLOY / "README.md").read_text(), "a volume is shown for it"
    if "l4t" in image.name:  # a group in USER would switch the group video off
        assert ":" not in user and "--groups video" in " ".join(by_name["RUN"])


def test_packages_are_installed_as_they_are_called(image: Path) -> None:
    text = " ".join(rest for name, rest in instructions(image) if name == "RUN")
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = {extra for group in re.findall(r"\.\[([\w,]+)\]", text) for extra in group.split(",")}
    assert "http" in extras
    for extra in extras:
        assert re.search(rf"(?m)^{extra} = \[", section), f"there is no extra {extra}"
    assert "apt-get install" not in text or text.count("apt-get install") == text.count(
        "--no-install-recommends"
    )
    assert text.count("apt-get update") == text.count("rm -rf /var/lib/apt/lists/*")
    if image.name == "Dockerfile.gpu":  # the CPU build goes before the GPU build comes
        assert text.index("uninstall --yes onnxruntime") < text.index("${ONNXRUNTIME}")


def test_shell_of_the_images_is_valid(image: Path) -> None:
    shell = shutil.which("sh")
    assert shell
    for name, rest in instructions(image):
        if name == "RUN":
            script = re.sub(r"^--mount=\S+ ", "", rest)
            done = subprocess.run([shell, "-n", "-c", script], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{script}: {done.stderr}"


@pytest.mark.parametrize("wheels", [(), ("tensorrt-8.5.2.2-cp310-none-linux_aarch64.whl",), ("onnxruntime_gpu-1.23.0-cp310-cp310-linux_aarch64.whl", "b.whl")])  # fmt: skip
@pytest.mark.parametrize("name", ["Dockerfile.l4t", "Dockerfile.l4t-jetpack5"])
def test_wheels_of_the_builder_are_installed(tmp_path: Path, name: str, wheels: tuple[str, ...]) -> None:
    """The very command of the image, with a pip that writes down what it is called with."""
    (command,) = [
        rest for instruction, rest in instructions(DEPLOY / name) if "--mount=type=bind,from=wheels" in rest
    ]
    folder = tmp_path / "wheels"
    folder.mkdir()
    for wheel in wheels:
        (folder / wheel).touch()
    log = tmp_path / "log"
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    tool.chmod(0o755)
    script = command.partition(" ")[2].replace("/wheels", str(folder))
    script = script.replace("/opt/lp-edge/bin/pip", str(tool)).replace("uv pip", f"{tool} pip")
    done = subprocess.run(
        ["sh", "-e", "-c", script], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    assert calls[0].endswith(".[http]")
    removed = [call for call in calls if "uninstall" in call]
    assert bool(removed) is any(wheel.startswith("onnxruntime_gpu") for wheel in wheels)
    last = [call for call in calls if "--no-deps" in call]
    assert bool(last) is bool(wheels)
    assert all(str(folder / wheel) in last[0] for wheel in wheels)
    assert not removed or calls.index(removed[0]) < calls.index(last[0])


def test_everything_that_is_copied_is_there_and_not_ignored(image: Path) -> None:
    rules = (DEPLOY / f"{image.name}.dockerignore").read_text().splitlines()
    assert f"docker build -f deploy/{image.name} " in rules[0]
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    for source in copied(image):
        assert (ROOT / source).exists(), source
        last = [rule for rule in rules if fnmatch.fnmatch(source, rule.lstrip("!"))][-1]
        assert last.startswith("!"), f"{source} is not sent"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert sent == set(copied(image)), "nothing else is sent"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip would build of what is copied into an image; all images get the same."""
    pytest.importorskip("setuptools", minversion="77")
    sources = {name: copied(DEPLOY / name) for name in IMAGES}
    assert len({tuple(sorted(names)) for names in sources.values()}) == 1
    folder = tmp_path_factory.mktemp("image")
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in sources["Dockerfile"]:
        target = folder / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, target)
    command = [*(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder / "src")],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_what_is_copied_installs(wheel: Path) -> None:
    """It has every package and its data."""
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


def test_entry_point_and_health_check_run(wheel: Path, tmp_path: Path) -> None:
    """Installed as in the image, beside this environment's packages: the server starts, answers, and ends at SIGTERM."""
    pytest.importorskip("grpc_health.v1")
    place = tmp_path / "opt"
    command = [*(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(place))]
    done = subprocess.run(
        [*command, str(wheel)], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    (program,) = json.loads(dict(stages(DEPLOY / "Dockerfile")[""])["ENTRYPOINT"])
    server = subprocess.Popen(
        [str(place / "bin" / program), "--listen", "127.0.0.1:0", "--backend", "cpu", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.communicate(timeout=SECONDS)[1]
        check = [sys.executable, str(DEPLOY / "health.py")]
        asked = {**environment, "LP_SERVE_HEALTH": json.loads(line)["grpc"]}
        done = subprocess.run(check, capture_output=True, text=True, timeout=SECONDS, env=asked, check=False)
        assert done.returncode == 0 and done.stdout.endswith(": serving\n"), done.stdout + done.stderr
        server.terminate()
        assert server.wait(SECONDS) == 0
    finally:
        server.kill()
        server.communicate(timeout=SECONDS)
    done = subprocess.run(check, capture_output=True, text=True, timeout=SECONDS, env=asked, check=False)
    assert done.returncode == 1 and "UNAVAILABLE" in done.stdout


def test_arguments_in_the_document_are_real() -> None:
    text = (DEPLOY / "README.md").read_text()
    known = {argument for name in IMAGES for argument in arguments(DEPLOY / name)}
    named = re.findall(r"--build-arg (\w+)=(\S+?)[ `]", text)
    assert {name for name, _ in named} <= known and len(named) >= 4
    assert all(re.search(r"\d\.\d|\d\d-py3", value) for _, value in named), "pinned here too"


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
