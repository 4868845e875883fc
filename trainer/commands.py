"""The command lines beside training: `key=value` arguments read into a dataclass, strictly, without Hydra."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from trainer.errors import ConfigError, UserError
from trainer.wording import describe, did_you_mean

Options = TypeVar("Options")


def run_command(
    options: type[Options], action: Callable[[Options], None], usage: str, argv: Sequence[str] | None = None
) -> int:
    """Parse `argv` (None: this process's), do `action`, return the exit code.

    A UserError becomes one message on standard error and its exit code; `debug.traceback=true` shows where it arose.
    `--help` prints `usage` and the options.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(arguments):
        print(usage.strip() + "\n\n" + describe_options(options))
        return 0
    show_traceback = "debug.traceback=true" in arguments
    try:
        action(parse_options(options, [argument for argument in arguments if argument != "debug.traceback=true"]))
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse_options(options: type[Options], arguments: Sequence[str]) -> Options:
    """`options`: a dataclass whose fields are str, int, float, bool, one of them or None, or list[str] (key repeated).

    Raises ConfigError with every problem found.
    """
    hints = get_type_hints(options)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            problems.append(f"'{argument}' is not key=value.")
        elif key not in hints:
            problems.append(f"Unknown key {key}={text}{did_you_mean(key, hints)} Known: {', '.join(hints)}.")
        elif get_origin(hints[key]) is list:
            values.setdefault(key, []).append(text)
        elif key in values:
            problems.append(f"{key} is given twice.")
        else:
            try:
                values[key] = _convert(text, hints[key])
            except ValueError:
                problems.append(f"{key}={text} must be {describe(hints[key])}.")
    given = {argument.partition("=")[0] for argument in arguments}
    problems += [
        f"{field.name}=... is missing." for field in _fields(options) if _required(field) and field.name not in given
    ]
    if problems:
        raise ConfigError(*problems)
    return options(**values)


def describe_options(options: type[Any]) -> str:
    """One line an option: its name, what it takes, and its default."""
    hints = get_type_hints(options)
    lines = []
    for field in _fields(options):
        facts = ["a text, may be repeated" if get_origin(hints[field.name]) is list else describe(hints[field.name])]
        if _required(field):
            facts.append("required")
        elif field.default is not MISSING:
            facts.append(f"default {_show(field.default)}")
        lines.append(f"  {field.name + '=':<14}{'; '.join(facts)}")
    return "\n".join(["Options:", *lines])


def _show(value: object) -> str:
    """A default as one would type it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _convert(text: str, hint: Any) -> Any:
    """`text` as `hint`; raises ValueError."""
    if get_origin(hint) is UnionType:
        if text in ("null", "none", "None"):
            return None
        hint = next(member for member in get_args(hint) if member is not NoneType)
    if hint is bool:
        choices = {"true": True, "false": False}
        if text.lower() not in choices:
            raise ValueError(text)
        return choices[text.lower()]
    return hint(text)


def _fields(options: type[Any]) -> tuple[Field[Any], ...]:
    return fields(options)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
