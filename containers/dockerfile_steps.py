"""Reads a Dockerfile as far as ours go, and writes its steps as shell calls for test_in_chroot.sh."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["Step", "parse", "shell_calls"]

_COPY_FROM = re.compile(r"--from=(\S+)\s+")


class Step(NamedTuple):
    """One instruction: its name in capitals, and the rest as it stands, continuation lines joined."""

    name: str
    rest: str


def parse(text: str) -> list[Step]:
    """The steps of a Dockerfile, without comments and parser directives.

    Here-documents and other escape characters are not known; hadolint reads the whole language.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(name.upper(), rest.strip()) for name, _, rest in map(_split, joined.splitlines()) if name]


def _split(line: str) -> tuple[str, str, str]:
    return line.strip().partition(" ")


def shell_calls(steps: list[Step]) -> list[str]:
    """One line of shell a step: ``step_run 'pip install x'``; what docker alone can do is left out."""
    calls = []
    for name, rest in steps:
        if name in ("FROM", "ARG", "WORKDIR", "USER"):
            calls.append(shlex.join([f"step_{name.lower()}", *shlex.split(rest)]))
        elif name == "ENV":
            calls += [shlex.join(["step_env", *pair.split("=", 1)]) for pair in shlex.split(rest)]
        elif name == "RUN":
            calls.append(shlex.join(["step_run", rest]))
        elif name == "COPY":
            found = _COPY_FROM.match(rest)
            calls.append(shlex.join(["step_copy", found[1] if found else "", *shlex.split(_COPY_FROM.sub("", rest))]))
        elif name in ("ENTRYPOINT", "HEALTHCHECK"):
            calls.append(shlex.join([f"step_{name.lower()}", *json.loads(rest[rest.index("[") :])]))
    return calls


if __name__ == "__main__":
    sys.stdout.write("\n".join(shell_calls(parse(Path(sys.argv[1]).read_text(encoding="utf-8")))) + "\n")
