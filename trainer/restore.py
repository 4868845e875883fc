"""A trained run, ready to be used: its parts rebuilt and its weights loaded, whatever ranks and engine trained it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from trainer import distributed
from trainer.build import build, check_parts
from trainer.checkpoint.load import Reader, find
from trainer.config import Config, config_from_yaml
from trainer.data.corpus import Corpus
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import CheckpointError
from trainer.parts import DTYPES, make_corpus, make_task
from trainer.run_directory import RunDirectory
from trainer.tasks import Task


@dataclass(frozen=True, slots=True)
class RestoredRun:
    """A run as it stood at `step`. model: on this process's device, in the run's precision, in evaluation mode."""

    config: Config
    directory: RunDirectory
    corpus: Corpus
    tokenizer: Tokenizer | None
    task: Task
    model: torch.nn.Module
    step: int


def restore_run(name: str, runs_dir: str = "runs", checkpoint: str = "latest") -> RestoredRun:
    """Rebuild the run `name` from its directory; checkpoint: "latest", "best" or a step.

    Raises CheckpointError when there is no such run or checkpoint, or when the weights do not fit the model.
    """
    directory = RunDirectory(Path(runs_dir) / name)
    if not directory.config.is_file():
        existing = ", ".join(sorted(path.parent.name for path in Path(runs_dir).glob("*/config.yaml"))) or "none"
        raise CheckpointError(f"run={name}: there is no {directory.config}; runs in {runs_dir}: {existing}.")
    config = config_from_yaml(directory.config)
    check_parts(config)
    found = find(directory.checkpoints, checkpoint)
    tokenizer = None if config.tokenizer is None else load_tokenizer(directory.tokenizer)
    model: torch.nn.Module = build(config.model, "model")
    parameters = dict(model.named_parameters())
    with Reader(found) as reader:
        missing = sorted(set(parameters) - {name for name, state in reader.shapes if state == "master"})
        if missing:
            raise CheckpointError(
                f"{found.folder} lacks {len(missing)} parameters of the model: {', '.join(missing[:5])}."
            )
        for parameter, weights in reader.whole():
            parameters[parameter].data.copy_(weights)
    model = model.to(distributed.device(), DTYPES[config.precision]).eval()
    task = make_task(config, tokenizer)
    corpus = make_corpus(config, build({**config.data, "stages": []}, "data"), tokenizer, task)
    return RestoredRun(config, directory, corpus, tokenizer, task, model, found.state.step)
