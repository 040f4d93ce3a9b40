"""The container files agree with the pins, with each other and with the repository; docker itself is not needed."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import pathopipe

ROOT = Path(__file__).parents[1]
CONTAINERS = ROOT / "containers"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")


def load_steps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dockerfile_steps", CONTAINERS / "dockerfile_steps.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


STEPS = load_steps()


def steps_of(name: str) -> list[tuple[str, str]]:
    return list(STEPS.parse((CONTAINERS / name).read_text(encoding="utf-8")))


def runs_of(name: str) -> list[str]:
    """The shell commands of the build stage, one a piece of an ``&&`` chain, arguments of the build as $NAME."""
    steps = steps_of(name)
    last_from = max(number for number, (step, _) in enumerate(steps) if step == "FROM")
    runs = [rest for step, rest in steps[:last_from] if step == "RUN"]
    return [" ".join(command.split()) for run in runs for command in run.split("&&")]


def definition_post() -> list[str]:
    text = (CONTAINERS / "pathopipe.def").read_text(encoding="utf-8")
    found = re.search(r"%post\n(.*?)\n\n", text, re.DOTALL)
    assert found is not None
    post = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", found[1], flags=re.MULTILINE))
    return [" ".join(re.sub(r"\{\{ (\w+) \}\}", r"${\1}", line).split()) for line in post.splitlines()]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_everything_that_is_installed_is_held_to_the_pins(name: str) -> None:
    installs = [command for command in runs_of(name) if re.search(r"\bpip\b.* install\b", command)]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in command for command in installs)
    stated = dict(re.findall(r"\b([A-Za-z][\w.-]*)==([\w.]+)", " ".join(installs)))
    known = pins()
    for package, version in stated.items():
        assert known.get(package.lower(), version) == version
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in map(Requirement, build):
        assert requirement.specifier.contains(stated[requirement.name])


def test_torch_comes_from_the_index_that_fits() -> None:
    for name, index in (
        ("Dockerfile", "https://download.pytorch.org/whl/cpu"),
        ("Dockerfile.cuda", "https://pypi.org/simple"),
    ):
        assert ("ARG", f"TORCH_INDEX={index}") in steps_of(name)
        (command,) = (c for c in runs_of(name) if c.endswith(" torch torchvision"))
        assert '--index-url "${TORCH_INDEX}"' in command
        # From PyTorch's own index nothing but torch may come.
        assert ("--no-deps" in command) == ("pytorch.org" in index)
    assert {"torch", "torchvision"} <= set(pins())


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_is_not_run_by_root_and_carries_no_compiler(name: str) -> None:
    steps = steps_of(name)
    last_from = max(number for number, (step, _) in enumerate(steps) if step == "FROM")
    final = steps[last_from:]
    (user,) = (rest for step, rest in steps if step == "USER")
    assert user.split(":")[0] not in {"0", "root"} and ("USER", user) in final
    assert not [rest for step, rest in steps if re.search(r"apt-get|build-essential|gcc|sudo|chmod 777", rest)]
    assert [rest for step, rest in final if step == "COPY"] == ["--from=build /opt/pathopipe /opt/pathopipe"]
    assert ("ENTRYPOINT", '["pathopipe"]') in final
    (check,) = (rest for step, rest in final if step == "HEALTHCHECK")
    assert check.endswith('CMD ["pathopipe", "doctor"]')


@pytest.mark.parametrize("name", DOCKERFILES)
def test_bases_are_pinned_and_python_is_supported(name: str) -> None:
    steps = steps_of(name)
    (base,) = (rest.removeprefix("BASE=") for step, rest in steps if step == "ARG" and rest.startswith("BASE="))
    assert re.fullmatch(r"python:3\.(11|12|13)-slim-\w+", base)
    assert {rest.split()[0] for step, rest in steps if step == "FROM"} == {"${BASE}"}
    text = (CONTAINERS / "pathopipe.def").read_text()
    assert set(re.findall(r"^From: (.*)$", text, re.MULTILINE)) == {base}


@pytest.mark.parametrize("name", [*DOCKERFILES, "pathopipe.def"])
def test_labels_state_the_version(name: str) -> None:
    text = (CONTAINERS / name).read_text()
    (version,) = re.findall(r"org\.opencontainers\.image\.version[= ]\"?([\w.]+)", text)
    assert version == pathopipe.__version__
    for label in ("title", "licenses"):
        assert f"org.opencontainers.image.{label}" in text


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [rest.split()[:-1] for step, rest in steps_of(name) if step == "COPY" and "--from=" not in rest]
    names = {source for sources in copied for source in sources}
    for source in names:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert "*" in ignored
    text = (CONTAINERS / "pathopipe.def").read_text()
    assert set(re.findall(r"^    (\S+) /src/\S+$", text, re.MULTILINE)) == names


def test_the_three_files_build_alike() -> None:
    cpu, cuda, definition = runs_of("Dockerfile"), runs_of("Dockerfile.cuda"), definition_post()
    assert [command.replace("--no-deps --index-url", "--index-url") for command in cpu] == cuda
    assert [command for command in definition if command in cpu] == cpu


def test_dockerfiles_are_read_as_docker_reads_them() -> None:
    text = '# c\nFROM a AS b\nRUN x \\\n    # between\n    && y\nENV A=1 B="2 3"\nCOPY --from=b p q /r/\nUSER 1:2\n'
    calls = STEPS.shell_calls(STEPS.parse(text + 'HEALTHCHECK --interval=1s CMD ["d", "e"]\nCMD ["no"]\n'))
    assert calls == [
        "step_from a AS b",
        "step_run 'x && y'",
        "step_env A 1",
        "step_env B '2 3'",
        "step_copy b p q /r/",
        "step_user 1:2",
        "step_healthcheck d e",
    ]


def test_the_script_is_sound_shell() -> None:
    script = CONTAINERS / "test_in_chroot.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert script.stat().st_mode & 0o100
