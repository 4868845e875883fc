"""Parts: targets resolved, arguments bound to signatures, and every mistake named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from trainer.build import build, check, check_parts, fits, part_problems
from trainer.config import BatchConfig, Config
from trainer.errors import ConfigError
from trainer.schedule import Cosine

COSINE = {"_target_": "trainer.schedule.Cosine", "warmup": 10, "unit": "steps", "final": 0.1}
SCHEDULE_RUNTIME = ("total",)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of a user's own with a model class, a constant, and a module that needs what is not installed."""
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from nowhere import Shape\n"
        "LIMIT = 3\n"
        "class Tiny:\n    def __init__(self, width: int, *, depth: int = 2, shape: Shape | None = None):\n"
        "        if width < 1:\n            raise ValueError('width must be positive')\n"
        "        self.size = (width, depth)\n"
        "class Open:\n    def __init__(self, **options):\n        self.options = options\n"
    )
    (package / "broken.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "their_package"


def test_build_calls_the_target_with_configured_and_runtime_arguments() -> None:
    assert build(COSINE, "schedule", total=100) == Cosine(total=100, warmup=10, unit="steps", final=0.1)


def test_check_calls_nothing(outside: str) -> None:
    assert check({"_target_": f"{outside}.models.Tiny", "width": 0}, "model", ()) == []


def test_all_wrong_arguments_of_a_part_come_at_once(outside: str) -> None:
    part = {"_target_": f"{outside}.models.Tiny", "dept": 3, "shape": "any"}
    unknown, missing = check(part, "model", ())
    assert "model.dept is no argument of their_package.models.Tiny; did you mean model.depth?" in unknown
    assert "width, depth, shape" in unknown
    assert missing.startswith("model.width is missing") and "+model.width=" in missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup": "soon"}, "schedule.warmup='soon' is not a number"),
        ({"unit": "epochs"}, "schedule.unit='epochs' is not one of steps, tokens"),
        ({"final": True}, "schedule.final=True is not a number"),
        ({"total": 5}, "schedule.total=5 is given by the trainer; remove it"),
        ({"warmupp": 5}, "did you mean schedule.warmup?"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(change: dict[str, Any], message: str) -> None:
    (problem,) = check(COSINE | change, "schedule", SCHEDULE_RUNTIME)
    assert message in problem


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("trainer.schedul.Cosine", "there is no module trainer.schedul; did you mean trainer.schedule?"),
        ("trainer.schedule.Cosin", "there is no Cosin in trainer.schedule; did you mean trainer.schedule.Cosine?"),
        ("trainer.schedule.math", "is of type module; it must be a class or a function"),
        ("Cosine", "is no dotted path"),
        ("their_package.broken.Model", "it needs the package a_package_that_nobody_has; install it"),
        ("their_package.models.LIMIT", "is of type int; it must be a class or a function"),
    ],
)
def test_a_target_that_cannot_be_had_is_named_with_the_nearest(target: str, message: str, outside: str) -> None:
    (problem,) = check({"_target_": target}, "schedule", SCHEDULE_RUNTIME)
    assert problem.startswith(f"schedule._target_={target}") and message in problem
    with pytest.raises(ConfigError):
        build({"_target_": target}, "schedule", total=1)


def test_a_value_that_the_target_refuses_becomes_a_message_with_the_key(outside: str) -> None:
    with pytest.raises(ConfigError, match=r"model: their_package.models.Tiny refuses .*: width must be positive\."):
        build({"_target_": f"{outside}.models.Tiny", "width": 0}, "model")
    with pytest.raises(ConfigError, match=r"^schedule\.warmup=7 steps"):
        build(COSINE | {"warmup": 7}, "schedule", total=1)


def test_a_target_with_open_keywords_takes_any(outside: str) -> None:
    assert build({"_target_": f"{outside}.models.Open", "anything": [1]}, "model").options == {"anything": [1]}


def config_with(**changes: Any) -> Config:
    parts: dict[str, Any] = {
        "model": COSINE | {"total": 1.0},
        "task": COSINE | {"total": 1.0},
        "data": COSINE | {"total": 1.0},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "schedule": COSINE,
    }
    return Config(name="parts", steps=1, batch=BatchConfig(global_size=1), **parts | changes)


def test_check_parts_tells_the_problems_of_all_parts_together() -> None:
    sink = {"_target_": "trainer.schedule.Nothing"}
    config = config_with(optimizer={"_target_": "torch.optim.SGD", "lr": "fast"}, logging={"mine": sink})
    with pytest.raises(ConfigError) as caught:
        check_parts(config)
    assert len(caught.value.problems) == 2
    assert "optimizer.lr='fast' is not a number" in str(caught.value)
    assert "logging.mine._target_=trainer.schedule.Nothing" in str(caught.value)


def test_foreign_code_runs_only_when_allowed(outside: str) -> None:
    model = {"_target_": f"{outside}.models.Tiny", "width": 1}
    with pytest.raises(ConfigError, match=r"model\._target_=their_package.* add allow_targets=\[their_package\.\]"):
        check_parts(config_with(model=model))
    check_parts(config_with(model=model, allow_targets=["their_package."]))


@pytest.mark.parametrize(
    "target",
    ["trainer.checkpoint.save.prune", "trainer.run_directory.Path", "trainer.main.run", "torch.optim.lr_scheduler.Any"],
)
def test_only_classes_of_ours_are_parts(target: str) -> None:
    """Neither what a module of ours has imported, nor functions that do something at once."""
    with pytest.raises(ConfigError, match="is no part of a run"):
        check_parts(config_with(model={"_target_": target}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stages": [{"_target_": "os.system", "command": "ls"}]}, r"data\.stages\.0\._target_=os\.system is code"),
        ({"stages": [{"column": "en"}]}, r"data\.stages\.0 is no part: it needs _target_"),
        ({"sources": {"a": {"task": {"_target_": "os.system"}}}}, r"sources\.a\.task\._target_=os\.system is code"),
        ({"sources": {"a": {"task": {"souce_column": "x"}}}}, r"sources\.a\.task\.souce_column is no argument"),
    ],
)  # fmt: skip
def test_parts_within_data_are_parts_too(data: dict[str, Any], message: str) -> None:
    task = {"_target_": "trainer.tasks.translation.Translation", "source_column": "en", "target_column": "de"}
    (problem, *_) = part_problems({"task": task, "data": {"_target_": "trainer.data.stream.StreamData", **data}})
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (None, int | None, True),
        ("x", int | None, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([1, 2], Sequence[int], True),
        ([1, "x"], Sequence[int], False),
        ("ab", list[str], False),
        ([0.9, 0.98], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ([1, 2, 3], tuple[int, ...], True),
        ({"a": 1}, dict[str, int], True),
        (3, dict[str, int], False),
        ("anything", Path, True),
        ("fast", float | Path, False),
        ("anything", Any, True),
    ],
)
def test_values_of_a_yaml_file_against_annotations(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected
