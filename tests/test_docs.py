"""Every command in the documentation is one that would be accepted: composed, parsed, and found, though not run.

What a text means as a place for the reader's own value (`FOLDER`, `NAME`, `...`) is filled in. A command that a page
shows with the problems of its configuration (not of its weights, which only a run opens) has to be refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.prepare import make_launcher
from trainer.build import part_problems
from trainer.commands import parse_options
from trainer.composition import axes, compose
from trainer.config import to_config
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("python", "torchrun", "deepspeed", "bash")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S+")
OUTSIDE = ("example_package", "hydra.searchpath", "HOST:PORT")
"""Commands with these words are run by tests of their own."""


class Command(NamedTuple):
    """A command as it stands in a page; refused: the page shows the error that it gives."""

    page: str
    text: str
    refused: bool

    @property
    def words(self) -> list[str]:
        """Without variables of the environment before it and a comment behind it."""
        words = shlex.split(self.text, comments=True)
        while ASSIGNMENT.fullmatch(words[0]):
            words.pop(0)
        return words


def commands_of(page: Path) -> Iterator[Command]:
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    for block in re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            for part in line.removeprefix("$ ").split(" && "):
                shown = re.match(r"error: \d+ problems", after) is not None and "init_from" not in part
                yield Command(name, " ".join(part.split()), shown)
    for inline in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        for part in inline.split(" && "):
            yield Command(name, part, False)


def is_command(command: Command) -> bool:
    try:
        words = command.words
    except (ValueError, IndexError):
        return False
    if {"...", "experiment=..."} & set(words) or any("[" in word.partition("=")[0] for word in words):
        return False  # a pattern: the rest of it is up to the reader
    return len(words) > 1 and words[0] in PROGRAMS and not any(word in command.text for word in OUTSIDE)


COMMANDS = sorted({command for page in PAGES for command in commands_of(page) if is_command(command)})


def test_the_documentation_has_commands_of_every_kind() -> None:
    programs = {command.words[0] for command in COMMANDS}
    assert programs == set(PROGRAMS) and any(command.refused for command in COMMANDS) and len(COMMANDS) > 80


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text[:80]}")
def test_a_command_of_the_documentation_is_accepted(command: Command) -> None:
    program, *rest = command.words
    if program == "bash" or rest[0].endswith(".py"):
        script, *arguments = rest
        text = (ROOT / script).read_text(encoding="utf-8")
        options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        assert program == "bash" or all(f'"{option}"' in text or f'"{option[2:]}"' in text for option in options)
        return
    module, arguments = split(rest)
    if module == "trainer":
        accept(tuple(arguments), command.refused)
    elif module is not None:  # else only options of torchrun or deepspeed are spoken of
        accept_of(module, arguments)


def accept_of(module: str, arguments: list[str]) -> None:
    """A command with options of its own, perhaps beside words for a launcher and for the trainer."""
    spec = importlib.util.find_spec(f"{module}.__main__") if is_package(module) else importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    source = Path(spec.origin).read_text(encoding="utf-8")
    flags = [word for word in arguments if word.startswith("--")]
    assert all(f'"{flag}"' in source for flag in flags), flags
    found = vars(importlib.import_module(spec.name))
    options = [value for name, value in found.items() if name.endswith("Options") and is_dataclass(value)]
    keys = {entry.name for one in options[:1] for entry in fields(one)}
    words = [word for word in arguments if word not in flags]
    own = [word for word in words if word.partition("=")[0] in keys]
    place = [word for word in words if word.startswith("launcher")]
    rest = [word for word in words if word not in own and word not in place]
    if options and own:
        parse_options(options[0], own)
    if place:
        make_launcher(place)
    if rest:
        accept(tuple(rest), refused=False)


def is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def split(words: list[str]) -> tuple[str | None, list[str]]:
    """The module that a command of python, torchrun or deepspeed starts, and its arguments."""
    for flag in ("-m", "--module"):
        if flag in words:
            at = words.index(flag)
            return words[at + 1], words[at + 2 :]
    return None, []


@cache
def accept(words: tuple[str, ...], refused: bool) -> None:
    """Compose and check as a run would, once for all pages; a sweep by the first value of each key."""
    if "--help" in words:
        return
    flags = ("-m", "--cfg", "job", "--resolve")
    filled = [re.sub(r"=\.\.\.$", "=1", word) for word in words if word not in flags]
    if "-m" in words or "interval(" in " ".join(words):
        same, keys = axes(filled)
        filled = [*same, *(f"{axis.key}={axis.choices[0] if axis.choices else axis.low}" for axis in keys)]
    if not any(word.startswith("experiment=") for word in filled):
        filled += [f"{key}=1" for key in ("steps", "batch.global_size") if not any(key in word for word in filled)]
        filled += [] if any(word.startswith("name=") for word in filled) else ["name=mine"]
    if refused:
        with pytest.raises(ConfigError):
            to_config(compose(filled), part_problems)
    else:
        to_config(compose(filled), part_problems)
