"""`python -m trainer` as people and launchers use it."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import trainer.__main__ as command_line
from trainer import composition
from trainer.config import Config
from trainer.errors import ConfigError, DataError

Outcome = tuple[int, str, str]
CommandLine = Callable[..., Outcome]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, list[str]]]:
    """What `trainer.main.run` is asked to run, instead of running it."""
    asked: list[tuple[Config, list[str]]] = []

    def run(config: Config, overrides: Sequence[str]) -> int:
        asked.append((config, list(overrides)))
        return 0

    stand_in = ModuleType("trainer.main")
    stand_in.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trainer.main", stand_in)
    return asked


@pytest.fixture
def trainer(
    runs: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """Call the command line in this process: exit code, stdout, stderr. Training itself is replaced by `runs`."""

    def call(*arguments: str) -> Outcome:
        handlers, level = set(logging.root.handlers), logging.root.level
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
        try:
            code = command_line.main()
        except SystemExit as ended:  # Hydra's own way out of --help and of wrong flags
            code = int(ended.code or 0)
        for handler in handlers.symmetric_difference(logging.root.handlers):
            logging.root.removeHandler(handler)  # of --info, as is the level
        logging.root.setLevel(level)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_a_run_gets_the_configuration_and_what_was_typed(
    trainer: CommandLine, runs: list[tuple[Config, list[str]]], tmp_path: Path
) -> None:
    assert trainer("experiment=quickstart", "optimizer.lr=0.5", "logging=[console]", "name=mine")[0] == 0
    ((config, overrides),) = runs
    assert (config.name, config.optimizer["lr"], list(config.logging)) == ("mine", 0.5, ["console"])
    assert overrides == ["experiment=quickstart", "optimizer.lr=0.5", "logging=[console]", "name=mine"]
    assert list(tmp_path.iterdir()) == [], "Hydra left files behind"


def test_sinks_can_all_be_switched_off(trainer: CommandLine, runs: list[tuple[Config, list[str]]]) -> None:
    assert trainer("experiment=quickstart", "logging=[]")[0] == 0
    assert runs[0][0].logging == {}


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_the_exit_code_is_that_of_the_run(trainer: CommandLine, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(sys.modules["trainer.main"], "run", lambda config, overrides: code)
    assert trainer("experiment=quickstart")[0] == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
        (["lr=1"], ["lr is no key", "did you mean optimizer.lr?"]),
        (["stepps=1"], ["did you mean steps?"]),
        (["modle=decoder"], ["modle is no key", "did you mean model?"]),
        (["+foo=1"], ["foo is no key of the configuration."]),
        (["+batch.foo=1"], ["batch.foo is no key of the configuration"]),
        (["+model.depth=1"], ["model.depth is no argument of trainer.models.encoder_decoder.EncoderDecoder"]),
        (["+steps=7"], ["+steps=7: steps is there already; write steps=7"]),
        (["model=decodr"], ["model=decodr is no choice", "did you mean decoder?", "Choices:", "encoder_decoder"]),
        (["logging=[consol]"], ["logging=consol is no choice", "did you mean console?", "wandb"]),
        (["experiment=quickstrt"], ["experiment=quickstrt is no choice", "did you mean quickstart?"]),
        (["steps=["], ["'steps=['", "is no override", "key=value"]),
        (["steps"], ["'steps' is no override"]),
        (["steps=1,2"], ["steps=1,2 names several values", "-m"]),
        (["steps=abc"], ["steps='abc' is not a whole number"]),
        (["optimizer.lr=fast"], ["optimizer.lr='fast' is not a number"]),
        (["model.norm=batch"], ["model.norm='batch' is not one of layer, rms"]),
        (["name=???"], ["name has no value; set name=..."]),
        (["name=../up"], ["name='../up' must be a folder name"]),
        (["batch.micro_size=5"], ["batch.micro_size=5 does not divide", "use batch.micro_size=4 or 6"]),
        (["optimizer._target_=torch.optim.AdamX"], ["there is no AdamX in torch.optim"]),
        (["optimizer._target_=os.system"], ["code outside trainer", "allow_targets=[os.]"]),
        (["~model.d_model", "~optimizer.nothing"], ["~optimizer.nothing", "does not exist"]),
        (["model.d_model.x=3"], ["model.d_model.x=3"]),
        (["model=null"], ["model=null is no choice of the group model", "Choices:"]),
        (["steps=${nothing}"], ["steps cannot be resolved: Interpolation key 'nothing' not found."]),
        (["foo/bar=x"], ["foo/bar is no key"]),
        (["=3"], ["'=3' is no override"]),
        (["batch=3"], ["batch=3 is no mapping of the keys global_size"]),
        (["hydra.foo=1"], ["hydra.foo is no key"]),
        (["launcher=slurm"], ["launcher is no group of this command", "python -m launch"]),
    ],
)
def test_bad_input_is_refused_with_key_value_and_cure(
    trainer: CommandLine, runs: list[object], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    code, _, err = trainer("experiment=quickstart", *arguments)
    assert code == 2
    assert err.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in err
    assert runs == [] and list(tmp_path.iterdir()) == []


def test_everything_wrong_is_told_at_once(trainer: CommandLine) -> None:
    code, _, err = trainer("experiment=quickstart", "seeed=1", "steps=x", "+foo=1", "optimizer.lr=fast", "log.every=0")
    assert code == 2
    assert err.startswith("error: 5 problems\n")
    for word in ("seeed", "steps='x'", "foo", "optimizer.lr='fast'", "log.every=0"):
        assert word in err


def test_no_arguments_at_all_says_what_is_missing_and_names_experiments(trainer: CommandLine) -> None:
    code, _, err = trainer()
    assert code == 2
    for key in ("name", "steps", "batch.global_size"):
        assert f"{key} has no value" in err
    assert "experiment=" in err


@pytest.mark.parametrize("switch", ["debug=traceback", "debug.traceback=true"])
@pytest.mark.parametrize("mistake", ["steps=abc", "optimizer.lrr=1"])
def test_the_traceback_is_shown_to_those_who_ask(trainer: CommandLine, switch: str, mistake: str) -> None:
    code, _, err = trainer("experiment=quickstart", mistake, switch)
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert f"error: {mistake.partition('=')[0]}" in err


def test_an_error_of_the_run_is_a_message_and_a_fault_is_not_hidden(
    trainer: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Config, overrides: Sequence[str]) -> int:
        raise DataError("data.path=nowhere.jsonl does not exist.")

    def fail(config: Config, overrides: Sequence[str]) -> int:
        raise ZeroDivisionError("our own fault")

    monkeypatch.setattr(sys.modules["trainer.main"], "run", refuse)
    assert trainer("experiment=quickstart") == (2, "", "error: data.path=nowhere.jsonl does not exist.\n")
    monkeypatch.setattr(sys.modules["trainer.main"], "run", fail)
    with pytest.raises(ZeroDivisionError, match="our own fault"):
        trainer("experiment=quickstart")


def test_a_sweep_runs_every_job_under_a_name_of_its_own(
    trainer: CommandLine, runs: list[tuple[Config, list[str]]]
) -> None:
    code, _, _ = trainer("-m", "experiment=quickstart", "optimizer.lr=0.1,0.2", "data.path=a/b,c")
    assert code == 0
    assert [config.name for config, _ in runs] == [
        f"quickstart-data.path={path},optimizer.lr={rate}" for rate in ("0.1", "0.2") for path in ("a_b", "c")
    ]
    assert runs[1][1] == ["experiment=quickstart", "optimizer.lr=0.1", "data.path=c"]


def test_a_name_that_was_given_stays_in_a_sweep(trainer: CommandLine, runs: list[tuple[Config, list[str]]]) -> None:
    trainer("-m", "experiment=quickstart", "name=a,b")
    assert [config.name for config, _ in runs] == ["a", "b"]


def test_names_in_a_sweep_stay_short_and_distinct(trainer: CommandLine, runs: list[tuple[Config, list[str]]]) -> None:
    long = "x" * 300
    trainer("-m", "experiment=quickstart", f"data.path={long}a,{long}b")
    first, second = (config.name for config, _ in runs)
    assert first != second and len(first) < 130


def test_a_failing_job_does_not_lose_the_others(
    trainer: CommandLine, runs: list[tuple[Config, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = sys.modules["trainer.main"].run

    def run(config: Config, overrides: Sequence[str]) -> int:
        if config.seed == 0:
            raise RuntimeError("the first one breaks")
        return int(go_on(config, overrides))

    monkeypatch.setattr(sys.modules["trainer.main"], "run", run)
    code, _, err = trainer("-m", "experiment=quickstart", "seed=0,-1,2")
    assert code == 1
    assert [config.seed for config, _ in runs] == [2]
    assert "the first one breaks" in err and "seed=-1 is below the least possible value" in err


def test_a_sweep_with_a_wrong_choice_or_key_is_refused_before_any_job(trainer: CommandLine, runs: list[object]) -> None:
    code, _, err = trainer("-m", "experiment=quickstart", "engine=plain,zero9", "optimizer.lrr=1,2")
    assert (code, runs) == (2, [])
    assert "engine=zero9 is no choice" in err and err.count("zero9") == 1


def test_help_lists_groups_and_keys(trainer: CommandLine) -> None:
    code, out, err = trainer("--help")
    assert (code, err) == (0, "")
    assert "experiment: " in out and "quickstart" in out and "batch.global_size" in out
    assert len(out.splitlines()) < 60
    assert "??" not in out


def test_cfg_job_prints_yaml_with_every_key(trainer: CommandLine) -> None:
    code, out, _ = trainer("--cfg", "job", "--resolve", "experiment=quickstart", "tokenizer.vocab_size=123")
    assert code == 0
    assert "vocab_size: 123" in out and "trace: false" in out and "hydra" not in out


def test_mistakes_are_told_by_cfg_too_without_asking_for_more(trainer: CommandLine) -> None:
    code, _, err = trainer("--cfg", "job", "optimizer.lrr=1")
    assert code == 2
    assert err.count("\n") == 1 and "did you mean optimizer.lr?" in err


def test_info_defaults_names_the_files(trainer: CommandLine) -> None:
    code, out, _ = trainer("--info", "defaults", "experiment=quickstart")
    assert code == 0
    assert "experiment/quickstart" in out


def test_a_folder_of_ones_own_adds_choices(
    trainer: CommandLine, runs: list[tuple[Config, list[str]]], tmp_path: Path
) -> None:
    mine = tmp_path / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "own.yaml").write_text("# @package _global_\ndefaults: [quickstart, _self_]\nname: own\nseed: 7\n")
    flags = ("--config-dir", str(tmp_path / "mine"))
    assert trainer(*flags, "experiment=own")[0] == 0
    assert (runs[0][0].name, runs[0][0].seed) == ("own", 7)
    _, _, err = trainer(*flags, "experiment=own", "seeed=1")
    assert err == "error: seeed=1: seeed is no key of the configuration; did you mean seed?\n"
    _, _, err = trainer("--config-dir", "nowhere", "experiment=own")
    assert err == "error: --config-dir nowhere is no folder.\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("# @package _global_\nname: [1\n", ["broken.yaml", "line 3"]),
        ("# @package _global_\ndefaults: [{override /model: foo}]\n", ["experiment=broken", "model/foo", "lstm"]),
        ("# @package _global_\ndefaults: [quickstart, _self_]\nstepps: 3\n", ["stepps is no key", "steps?"]),
        ("- 1\n", ["experiment's file", "# @package _global_"]),
        ("name: forgot\nsteps: 1\nbatch: {global_size: 1}\n", ["experiment's file", "# @package _global_"]),
    ],
)
def test_a_broken_file_of_ones_own_is_named(
    trainer: CommandLine, tmp_path: Path, content: str, words: list[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text(content)
    code, _, err = trainer("--config-dir", str(tmp_path), "experiment=broken")
    assert code == 2 and err.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize("flags", [["--cfg", "job", "-m"], ["--resolve"], ["--config-name", "nothing"]])
def test_flags_that_cannot_be_are_a_message(trainer: CommandLine, flags: list[str]) -> None:
    code, _, err = trainer(*flags)
    assert code == 2 and err.startswith("error: ") and "Traceback" not in err


def test_configs_are_found_in_a_clone_and_in_an_installed_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "trainer"
    package.mkdir()
    monkeypatch.setattr(composition, "__file__", str(package / "composition.py"))
    assert composition.config_directory() == tmp_path / "configs"
    (package / "configs").mkdir()
    assert composition.config_directory() == package / "configs"


def test_compose_tells_every_mistake() -> None:
    with pytest.raises(ConfigError, match=r"did you mean optimizer.lr\?"):
        composition.compose(["experiment=quickstart", "optimizer.lrr=1"])


@pytest.mark.parametrize(
    ("arguments", "kept", "rank"),
    [
        (["--local_rank=3", "a=1"], ["a=1"], "3"),
        (["a=1", "--local_rank", "2"], ["a=1"], "2"),
        (["--local-rank=1"], [], "1"),
        (["a=1", "--cfg", "job"], ["a=1", "--cfg", "job"], None),
    ],
)
def test_the_local_rank_of_the_deepspeed_launcher_is_taken_off(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], kept: list[str], rank: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {})
    assert command_line.without_local_rank(arguments) == kept
    assert os.environ.get("LOCAL_RANK") == rank


def test_a_local_rank_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    command_line.without_local_rank(["--local_rank=5"])
    assert os.environ["LOCAL_RANK"] == "0"


QUIET = (
    "import runpy, sys\nsys.argv[0] = 'trainer'\ntry:\n    runpy.run_module('trainer', run_name='__main__')\nexcept \
SystemExit as ended:\n    heavy = {'torch', 'deepspeed', 'datasets', 'wandb', 'transformers'} & set(sys.modules)\n    \
sys.exit(f'imported {heavy}' if heavy or ended.code else 0)\n"
)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job", "experiment=quickstart"]])
def test_questions_are_answered_in_two_seconds_without_torch(
    arguments: list[str], tmp_path: Path, trainer_env: dict[str, str]
) -> None:
    """Processor seconds, which other tests on the same cores disturb least."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", QUIET, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=trainer_env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dist
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_one_rank_tells_an_error_that_all_have(launcher: str, run_trainer: Any, tmp_path: Path) -> None:
    done = run_trainer(["experiment=quickstart", "stepps=1"], ranks=2, launcher=launcher)
    assert done.returncode != 0
    told = [line for line in done.output.splitlines() if "did you mean steps?" in line]
    assert sum("error: " in line for line in told) == 1  # torchrun's own words end with it once more
    assert len(told) == (2 if launcher == "torchrun" else 1)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_one_rank_has_alone_is_told_by_it(trainer: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command_line, "PATIENCE_SECONDS", 0.01)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert trainer("experiment=quickstart", "steps=abc") == (
            2,
            "",
            "[rank 3] error: steps='abc' is not a whole number.\n",
        )
    finally:
        signal.signal(signal.SIGTERM, before)
