"""The documentation's commands, run: as they stand, but on small models and for a few steps, and with `dry_run=true`
where a cluster, a hub or data that are not here are asked for. `ONLY_PARSED` says which are not run here, and why; of
these `tests/test_docs.py` makes sure that they would be accepted.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from tests.test_docs import COMMANDS, Command, split
from tests.warm import run_warm

ONLY_PARSED = {
    r"^bash |scripts/report\.py": "tests/scripts/test_quickstart.py and test_setup.py run them",
    r"scripts/bench/": "measures for minutes",
    r"scripts/data/": "fetches data; tests/scripts/data runs what it does with them",
    r"scripts/chaos\.py": "tests/scripts/test_chaos.py runs a short session",
    r"scripts/agent\.py": "needs a run of hours; tests/export/test_serve.py runs it with a small one",
    r"^torchrun (-\S+ ?)+$|^python -m \S+ ?$|--config-path": "a name in a sentence, or what a launcher starts",
    r"launch\.doctor": "tests/launch/doctor runs it on this machine and on two nodes",
    r"launch\.planner\.validate": "tests/launch/planner/test_validate.py; --write and --fit change this tree",
    r"launch\.(stop|resume|logs) ": "of a launched run: tests/launch/test_local.py",
    r"launch\.dashboard project=shardwright$": "sends to W&B; with preview=true it is run",
    r"run=(chat_small|recommendation|agent|summarisation)\b": "the run takes an hour or more",
    r"trainer\.generate run=\S+ text=(a\.wav|12 )": "needs a run on speech or on interactions",
    r"trainer\.reference_scores": "needs a chat run; tests/tasks/test_preference.py",
    r"adapters=true": "needs a run with adapters; tests/export/test_adapters.py",
    r"model=hf ": "needs a folder of transformers; tests/models/test_hf.py",
    r"sweep=optuna": "tests/launch/sweeps/test_search.py",
}
"""Why a command that has this pattern is not run here."""

SHORT = "steps=2 schedule.warmup=1 log.every=1 eval.every=0 eval.final_split=none checkpoint.every=0 logging=[console]"
TEXT = f"{SHORT} tokenizer.vocab_size=512 tokenizer.max_records=500 data.block=32 model.d_model=32"
TEXT += " batch.global_size=16"
HEADS = f"{TEXT} model.num_heads=4 model.d_ff=64"
LAYERS = f"{HEADS} model.num_layers=1"
BOTH = f"{HEADS} model.encoder_layers=1 model.decoder_layers=1"
RUN = {
    "quickstart": BOTH,
    "t5_span_corruption": f"{BOTH} task.input_length=64",
    "bert_masked_lm": LAYERS,
    "lm_small": LAYERS,
    "digits_cnn": SHORT,
    "digits_mlp": SHORT,
    "translation_lstm": f"{TEXT} model.hidden_size=32 model.num_layers=1",
}
"""Experiments whose data are packaged, and what makes them short."""

RUNS: dict[str | None, str] = {"trainer.export": "t5_span_corruption"}
"""The run that stands for the reader's own: one that transformers has a counterpart of; else the quick start's."""


def reason(command: Command) -> str | None:
    text = " ".join(command.words)
    return next((why for pattern, why in ONLY_PARSED.items() if re.search(pattern, text)), None)


def distinct() -> list[Command]:
    """Each command once; those that train first, and of these last a run of which others tell."""
    once = {(*environment(command).items(), *filled(command)): command for command in COMMANDS if not command.refused}

    def place(command: Command) -> tuple[bool, bool, int]:
        return split(command.words)[0] != "trainer", "name=" in command.text, len(command.text)

    return sorted(once.values(), key=place)


def filled(command: Command) -> list[str]:
    """Its words, with a run and a folder of this session for those of the reader's own."""
    run, end = RUNS.get(split(command.words)[0], "quickstart"), len(command.words)
    own = (re.sub(r"^run=(NAME|mine|translation_base)$", f"run={run}", word) for word in command.words)
    return [re.sub(r"^to=(DIR|OUT)$", f"to=exported{end}", word) for word in own]


def environment(command: Command) -> dict[str, str]:
    """Variables before the command."""
    before = command.text.split()[: command.text.split().index(command.words[0])]
    return dict(word.split("=", 1) for word in before if word.startswith("WORLD_SIZE"))


def test_every_reason_not_to_run_a_command_is_that_of_one() -> None:
    texts = [" ".join(command.words) for command in COMMANDS]
    for pattern in ONLY_PARSED:
        assert any(re.search(pattern, text) for text in texts), pattern


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_the_commands_of_the_documentation_do_what_they_say(
    trainer_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_pairs").mkdir()
    lines = [json.dumps({"en": f"{word} it", "fr": f"le {word}"}) for word in ("send", "open", "close", "stop") * 50]
    for name in ("train", "validation", "test"):
        (tmp_path / "my_pairs" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "hosts").write_text("first slots=8\nsecond slots=8\n")
    monkeypatch.chdir(tmp_path)
    failures = []
    commands = [command for command in distinct() if reason(command) is None]
    for command in commands:
        words, ranks = shortened(command)
        module = words.pop(0)
        world_size = environment(command).get("WORLD_SIZE", "1")
        if "dry_run=true" in words:  # several are quicker in one process
            monkeypatch.setenv("WORLD_SIZE", str(max(ranks, int(world_size))))
            monkeypatch.setattr(sys, "argv", [module, *words])
            code = importlib.import_module(f"{module}.__main__").main()
            monkeypatch.delenv("WORLD_SIZE")
            told = "".join(capsys.readouterr())
        else:
            done = run_warm(module, words, ranks, tmp_path, trainer_env, timeout=240)
            code, told = done.returncode, done.stdout + done.stderr
        if code != 0:
            failures.append(f"{command.page}: {command.text}\n{module} {' '.join(words)}\n{told[-1500:]}")
    assert not failures, "\n\n".join(failures)
    assert len(commands) > 60
    for file in ("quickstart/metrics.jsonl", "quickstart/report.html", "profiled/profile"):
        assert (tmp_path / "runs" / file).exists()


def shortened(command: Command) -> tuple[list[str], int]:
    """Module and words of a command that takes a second, and its ranks: a dry run, where the other takes long."""
    module, words = split(filled(command))
    assert module is not None, command
    asked = re.search(r"--nproc_per_node=(\d)", command.text)
    ranks = int(asked[1]) if asked else 2 if command.words[0] == "deepspeed" else 1
    words = [word.replace("=...", "=64") for word in words if word != "dry_run=true"]
    experiment = next((word.partition("=")[2] for word in words if word.startswith("experiment=")), "")
    elsewhere = any(re.match(r"init_from=|data=hub|(data|tokenizer)\.path=(?!my_pairs)", word) for word in words)
    if module == "launch":
        words += ["dry_run=true", "runs_dir=launched"]
    elif module == "trainer" and not {"--help", "--cfg"} & set(words):
        if experiment not in RUN or elsewhere:
            words.append("dry_run=true")
        else:
            given = {word.partition("=")[0] for word in words if word != "steps=500"}
            words += [word for word in RUN[experiment].split() if word.partition("=")[0] not in given]
            if Path("runs", experiment).exists() and not {"-m", "name"} & ({*words} | given):
                words.append(f"name=run{len(list(Path('runs').iterdir()))}")
    elif module == "trainer.inspect":
        words += ["tokenizer.vocab_size=512", "tokenizer.max_records=500"]
    elif module == "trainer.evaluate":
        words.append("max_samples=4")
    return [module, *words], ranks
