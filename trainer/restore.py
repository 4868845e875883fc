"""A trained run, ready to be used: its parts rebuilt and its weights loaded, whatever ranks and engine trained it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch

from trainer import distributed
from trainer.build import build, check_parts
from trainer.checkpoint.average import WeightReader, find_all
from trainer.checkpoint.load import Checkpoint
from trainer.config import BatchConfig, Config, EngineConfig, EngineKind, config_from_yaml
from trainer.data.corpus import Corpus
from trainer.data.tokenizer import Tokenizer
from trainer.engine.ds_config import make_ds_config
from trainer.errors import CheckpointError
from trainer.initial import frozen_values
from trainer.parts import DTYPES, make_corpus, make_task
from trainer.plan import make_plan
from trainer.pretrained import first_weights
from trainer.run_directory import RunDirectory
from trainer.tasks import Task


@dataclass(frozen=True, slots=True)
class RestoredRun:
    """A run as it stood at the first of `steps`, whose weights are averaged where there are several. model: on this
    process's device, in the run's precision, in evaluation mode."""

    config: Config
    directory: RunDirectory
    corpus: Corpus
    tokenizer: Tokenizer | None
    task: Task
    model: torch.nn.Module
    steps: Sequence[int]

    @property
    def step(self) -> int:
        """The newest."""
        return self.steps[0]


@dataclass(frozen=True, slots=True)
class FoundRun:
    """What the directory of a run says, before anything is built. checkpoints: those whose weights are averaged, newest
    first; weights: "master", or "ema" for their moving average."""

    config: Config
    directory: RunDirectory
    checkpoints: Sequence[Checkpoint]
    tokenizer: Tokenizer | None
    weights: str = "master"

    @property
    def checkpoint(self) -> Checkpoint:
        """The one, or the newest."""
        return self.checkpoints[0]

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints."""
        return [checkpoint.state.step for checkpoint in self.checkpoints]

    @property
    def said(self) -> str:
        """What the weights are, in words, where they are not simply those of the checkpoint; else ""."""
        one = "moving average of the weights" if self.weights == "ema" else "weights"
        many = len(self.checkpoints)
        if many > 1:
            return f"mean of the {one} of the last {many} checkpoints"
        return one if self.weights == "ema" else ""

    def reader(self) -> WeightReader:
        """For the weights."""
        return WeightReader(self.checkpoints, self.weights)


def find_run(
    name: str,
    runs_dir: str = "runs",
    checkpoint: str = "latest",
    allow_targets: Sequence[str] = (),
    weights: str = "master",
) -> FoundRun:
    """The run `name`; checkpoint: "latest", "best", a step, or "average:N", the mean of the last N; weights: "master"
    or "ema".

    allow_targets: as in the configuration, and instead of the run's own: a run may come from somebody else. Raises
    ConfigError for a name that leads out of `runs_dir` and for other targets, CheckpointError when there is no such run
    or checkpoint.
    """
    directory = RunDirectory.existing(name, runs_dir, f"run={name}")
    config = config_from_yaml(directory.config)
    check_parts(replace(config, allow_targets=[one.strip("[] ") for one in allow_targets]))
    found = find_all(directory.checkpoints, checkpoint)
    tokenizer = None if config.tokenizer is None else directory.read_tokenizer()
    return FoundRun(config, directory, found, tokenizer, weights)


def load_model(run: FoundRun) -> torch.nn.Module:
    """The model in fp32 with the weights of the checkpoint, and of what it was begun with where it is not trained.

    Raises CheckpointError when they do not fit.
    """
    model: torch.nn.Module = build(run.config.model, "model")
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    with run.reader() as reader:
        _check(run, reader, {name: parameter.shape for name, parameter in parameters.items()}, trained)
        for parameter, weights in reader.whole():
            parameters[parameter].data.copy_(weights)
    if len(trained) < len(parameters) and (begun_with := first_weights(run.config, model)) is not None:
        for name in parameters.keys() - trained:
            parameters[name].data.copy_(frozen_values(begun_with, name).view(parameters[name].shape))
    return model


def _check(run: FoundRun, reader: WeightReader, shapes: Mapping[str, torch.Size], trained: Set[str]) -> None:
    folder = run.checkpoint.folder
    saved = {name: shape for (name, _), shape in reader.shapes.items()}
    missing = sorted(trained - set(saved))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} parameters of the model: {', '.join(missing[:5])}.")
    wrong = sorted(name for name in saved if name not in shapes or shapes[name] != saved[name])
    if wrong:
        raise CheckpointError(
            f"{folder} has {len(wrong)} parameters that the model has not, or not in their shape:"
            f" {', '.join(wrong[:5])}."
        )


def _load_sharded(run: FoundRun) -> torch.nn.Module:
    """`load_model` spread over the ranks by ZeRO-3: none ever holds more than its part. For models all of which is
    trained."""
    from trainer.engine.zero import ShardedModel  # DeepSpeed takes seconds to import

    engine = EngineConfig(kind=EngineKind.zero, stage=3)
    batch = BatchConfig(global_size=distributed.world_size(), micro_size=1)
    plan = make_plan(replace(run.config, engine=engine, batch=batch), distributed.world_size())
    dtype = DTYPES[run.config.precision]

    def build_in_dtype() -> torch.nn.Module:
        return build(run.config.model, "model").to(dtype)  # type: ignore[no-any-return]

    model = ShardedModel(build_in_dtype, make_ds_config(plan))
    with run.reader() as reader:
        shapes = {fragment.parameter: torch.Size(fragment.shape) for fragment in model.fragments()}
        _check(run, reader, shapes, set(shapes))
        for fragment in model.fragments():
            values = torch.empty(fragment.tensor.numel())
            reader.read_into(fragment.parameter, "master", fragment.start, values)
            fragment.tensor.copy_(values)
    return model.module


def restore_run(
    name: str,
    runs_dir: str = "runs",
    checkpoint: str = "latest",
    allow_targets: Sequence[str] = (),
    weights: str = "master",
    sharded: bool = False,
) -> RestoredRun:
    """Rebuild the run `name` from its directory. sharded: the model is spread over the ranks, which must step together.
    Arguments, and what is raised: see `find_run` and `load_model`."""
    run = find_run(name, runs_dir, checkpoint, allow_targets, weights)
    config, tokenizer = run.config, run.tokenizer
    model = _load_sharded(run) if sharded else load_model(run).to(distributed.device(), DTYPES[config.precision]).eval()
    task = make_task(config, tokenizer)
    corpus = make_corpus(config, build({**config.data, "stages": []}, "data"), tokenizer, task)
    return RestoredRun(config, run.directory, corpus, tokenizer, task, model, run.steps)
