"""The Dockerfile, the dev container and the editor's launch file, as far as no engine is needed to check them."""

from __future__ import annotations

import importlib.util
import json
import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    found = [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in found if word == name]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = [source for _, rest in instructions("COPY") for source in rest.split()[:-1]]
    assert {"requirements.lock", "configs", "trainer", "launch"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and not any(fnmatch(source, pattern) for pattern in ignored), source


def test_the_lock_is_installed_before_the_code_changes_the_layer() -> None:
    order = [rest for word, rest in re.findall(r"^(COPY|RUN) (.*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)]
    lock = next(place for place, rest in enumerate(order) if "-r requirements.lock" in rest)
    assert lock < next(place for place, rest in enumerate(order) if rest.startswith("trainer"))
    wheel = (ROOT / "pyproject.toml").read_text()
    assert "python:3.11" in instructions("FROM")[0][1] and 'requires-python = ">=3.11"' in wheel


def test_the_dev_container_is_made_of_the_dockerfile() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"


def test_the_editor_starts_modules_that_are_there() -> None:
    configurations = json.loads((ROOT / ".vscode/launch.json").read_text())["configurations"]
    assert all(importlib.util.find_spec(one["module"]) is not None for one in configurations)
    words = [word for one in configurations for word in one["args"] if word.startswith("experiment=")]
    assert words and all((ROOT / "configs/experiment" / f"{word.partition('=')[2]}.yaml").exists() for word in words)
