from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from trainer.commands import parse_options, run_command
from trainer.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Options:
    run: str
    text: list[str] = field(default_factory=list)
    beam_size: int | None = None
    scale: float = 1.0
    json: bool = False


def test_values_become_what_the_fields_say() -> None:
    words = ["run=a", "text=x = y", "text=", "beam_size=3", "scale=1e-3", "json=true"]
    assert parse_options(Options, words) == Options("a", ["x = y", ""], 3, 0.001, True)
    assert parse_options(Options, ["run=a", "beam_size=null"]) == Options("a")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(Options, ["beem_size=3", "json=maybe", "scale=big", "verbose"])
    assert list(caught.value.problems) == [
        "Unknown key beem_size=3; did you mean beam_size? Known: run, text, beam_size, scale, json.",
        "json=maybe must be true or false.",
        "scale=big must be a number.",
        "'verbose' is not key=value.",
        "run=... is missing.",
    ]


def test_a_key_given_twice_is_refused_unless_it_is_a_list() -> None:
    with pytest.raises(ConfigError, match="scale is given twice"):
        parse_options(Options, ["run=a", "scale=1", "scale=2"])


def test_an_error_of_the_user_is_one_message_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(options: Options) -> None:
        raise CheckpointError(f"run={options.run} has no checkpoint; train it first.")

    assert run_command(Options, refuse, "", ["run=a"]) == 2
    assert capsys.readouterr().err == "error: run=a has no checkpoint; train it first.\n"
    assert run_command(Options, refuse, "", ["run=a", "debug.traceback=true"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_success_is_zero() -> None:
    seen: list[Options] = []
    assert run_command(Options, seen.append, "", ["run=a"]) == 0
    assert seen == [Options("a")]


def test_help_shows_every_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Options, lambda options: pytest.fail("help does nothing"), "What it does.", ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "What it does."
    assert [line.split("=")[0].strip() for line in lines[3:]] == ["run", "text", "beam_size", "scale", "json"]
    assert "required" in lines[3] and "repeated" in lines[4] and "a whole number or null; default null" in lines[5]
