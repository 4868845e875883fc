"""The parts of a run that training and inference share: data, tokenizer, task, model; and whether they fit each
other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from trainer import distributed
from trainer.build import build
from trainer.config import Config, Precision, with_tokenizer_sha256
from trainer.data.corpus import Corpus, prefix_of, survey
from trainer.data.sources import column
from trainer.data.stages import NeedsPass, Stage
from trainer.data.stream import StreamData
from trainer.data.tokenizer import Tokenizer
from trainer.engine.average import with_average
from trainer.engine.base import BuildModel, Engine
from trainer.engine.ds_config import make_ds_config
from trainer.engine.plain import PlainEngine
from trainer.engine.private import PrivateEngine
from trainer.engine.recompute import lighten, stacked_layers
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluate import check_enough_samples
from trainer.optim import build_optimizer
from trainer.parallel.layout import Layout
from trainer.parallel.slices import Slice
from trainer.parallel.split import split_model
from trainer.plan import RunPlan
from trainer.run_directory import RunDirectory
from trainer.tasks import Task

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def make_tokenizer(config: Config, data: StreamData, directory: RunDirectory) -> tuple[Config, Tokenizer | None]:
    """The run's tokenizer: the one it already has, else a new one; and the configuration with its SHA-256.

    Rank 0 makes it, the others receive it; nothing is written. Raises CheckpointError when the run's file was changed.
    """
    if config.tokenizer is None:
        return config, None
    part = {name: value for name, value in config.tokenizer.items() if name != "sha256"}

    def make() -> str:
        if directory.tokenizer.exists():
            return directory.read_tokenizer().to_json()
        spec = build(part, "tokenizer")
        columns = {
            source: [part[name] for name in sorted(part) if name.endswith("_column") and part[name] is not None]
            for source, part in _task_parts(config, data).items()
        }
        for source, dataset in data.datasets.items():
            dataset.check("train", columns[source])
        prepared: Tokenizer = spec.prepare(lambda: _texts(data, columns))
        return prepared.to_json()

    tokenizer = Tokenizer.from_json(distributed.on_rank_zero(make))
    expected = config.tokenizer.get("sha256")
    if expected is not None and expected != tokenizer.sha256:
        raise CheckpointError(
            f"{directory.tokenizer}: SHA-256 {tokenizer.sha256[:12]}... is not tokenizer.sha256={expected[:12]}...;"
            " restore the file the run was begun with."
        )
    return with_tokenizer_sha256(config, tokenizer.sha256), tokenizer


def _texts(data: StreamData, columns: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """All texts of the train split, source by source, record by record."""
    for source, dataset in data.datasets.items():
        for _, record in dataset.records("train"):
            for name in columns[source]:
                try:
                    value = column(record, name)
                except KeyError:  # a bad record, which the loader counts
                    continue
                yield from _texts_in(value)


def _texts_in(value: Any) -> Iterator[str]:
    """The text that a column holds, or those of the messages in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for message in value:
            if isinstance(message, Mapping) and isinstance(message.get("content"), str):
                yield message["content"]


def make_corpus(config: Config, data: StreamData, tokenizer: Tokenizer | None, task: Task) -> Corpus:
    """The data with a task for each source, which is `task` but for the options the source changes, and with the
    stages. Raises ConfigError."""
    tasks: dict[str, Task] = {
        name: build(part, f"data.sources.{name}.task", tokenizer=tokenizer) if data.sources[name].task else task
        for name, part in _task_parts(config, data).items()
    }
    return Corpus(data, tasks, {name: make_stages(data, name) for name in data.datasets})


def make_stages(data: StreamData, source: str) -> list[Stage]:
    """The stages of a source, those that need it after a pass of rank 0 over the train split."""
    stages: list[Stage] = []
    for index, part in enumerate(data.stages):
        stage: Stage = build(part, f"data.stages.{index}")
        if isinstance(stage, NeedsPass):
            stage.adopt(
                distributed.on_rank_zero(partial(survey, stage, list(stages), data.datasets[source], prefix_of(source)))
            )
        stages.append(stage)
    return stages


def _task_parts(config: Config, data: StreamData) -> dict[str, dict[str, Any]]:
    """The configuration of each source's task."""
    return {name: {**config.task, **options.task} for name, options in data.sources.items()}


def make_task(config: Config, tokenizer: Tokenizer | None) -> Task:
    """The task, told its tokenizer."""
    task: Task = build(config.task, "task", tokenizer=tokenizer)
    return task


def check_fit(config: Config, task: Task, model: Any, tokenizer: Tokenizer | None) -> None:
    """Refuse parts that do not fit each other. Raises ConfigError with every problem. `model`: its twin on the meta
    device."""
    problems = []
    positions = getattr(model, "max_positions", None)
    if task.max_length is not None and positions is not None and task.max_length > positions:
        problems.append(
            f"The task makes sequences of up to {task.max_length} tokens, more than model.max_positions={positions};"
            " raise model.max_positions or lower the task's maximum length."
        )
    trained, made = getattr(task, "objective", None), getattr(model, "objective", None)
    if trained is not None and made is not None and trained != made:
        problems.append(
            f"The task {type(task).__name__} trains models for {trained}, and this {type(model).__name__} is one for"
            f" {made}; choose another task or model (of an Encoder, model.head)."
        )
    problems += _recording_problems(task, model)
    vocabulary = getattr(model, "vocab_size", None)
    if tokenizer is not None and vocabulary is not None and tokenizer.vocab_size > vocabulary:
        problems.append(
            f"The tokenizer has {tokenizer.vocab_size} entries, model.vocab_size={vocabulary} is fewer;"
            f" set model.vocab_size={tokenizer.vocab_size} or more."
        )
    if config.data.get("batching") == "packed" and not getattr(model, "packs_rows", False):
        problems.append(
            f"data.batching=packed: {type(model).__name__} does not keep the samples of a row apart;"
            " use data.batching=bucketed."
        )
    problems += engine_problems(config, type(task), model)
    if config.precision == Precision.fp16:
        problems += _fp16_problems(config, model)
    if problems:
        raise ConfigError(*problems)


def engine_problems(config: Config, task: type[Any], model: torch.nn.Module) -> list[str]:
    """What of `config.engine` does not go with a task of this class, the model or the optimizer."""
    problems = []
    if config.engine.sequence_parallel > 1 and not getattr(task, "splits_positions", True):
        problems.append(
            f"engine.sequence_parallel={config.engine.sequence_parallel}: the loss of {task.__name__} is no sum"
            " over positions, which ranks could share; use engine.sequence_parallel=1."
        )
    problems += _optimizer_problems(config)
    for key, value in (
        ("engine.recompute", config.engine.recompute),
        ("engine.offload_activations", config.engine.offload_activations),
    ):
        if value != "none" and not stacked_layers(model):
            problems.append(f"{key}={value}: {type(model).__name__} has no stack of layers; use {key}=none.")
    return problems


_WANTS_WHOLE = {
    "torch.optim.Adafactor": "adafactor keeps a second moment by rows and columns of each matrix",
    "trainer.optimizers.adamw_scale.AdamWScale": "adamw_scale measures each parameter as a whole",
    "trainer.optimizers.muon.Muon": "muon orthogonalises each matrix as a whole",
}
"""Optimizers that cannot update a part of a parameter by itself, and why."""


def _optimizer_problems(config: Config) -> list[str]:
    why = _WANTS_WHOLE.get(config.optimizer["_target_"])
    if why is None:
        return []
    cure = "use engine=plain, or optimizer=adamw or lion."
    problems = [f"optimizer={why}, and ZeRO flattens matrices; {cure}"] if config.engine.kind == "zero" else []
    if config.engine.tensor_parallel > 1:
        cure = "use engine.tensor_parallel=1, or optimizer=adamw or lion."
        problems.append(f"optimizer={why}, and engine.tensor_parallel splits matrices; {cure}")
    return problems


def _recording_problems(task: Task, model: Any) -> list[str]:
    """Of a task or a model that works on recordings: both have to, on frames of the same size, and not too many."""
    gives, takes = getattr(task, "num_mels", None), getattr(model, "num_mels", None)
    if gives is None and takes is None:
        return []
    if takes is None:
        return [
            f"{type(task).__name__} gives recordings, which {type(model).__name__} does not take; use model=speech."
        ]
    if gives is None:
        return [f"{type(model).__name__} takes recordings; use task=speech_recognition."]
    problems = []
    if gives != takes:
        problems.append(f"task.num_mels={gives} is not model.num_mels={takes}; give both the same number.")
    frames, most = getattr(task, "max_frames", None), getattr(model, "max_frames", None)
    if frames is not None and most is not None and frames > most:
        problems.append(
            f"task.max_seconds makes up to {frames} frames, more than the {most} of model.max_source_positions;"
            " lower the one or raise the other."
        )
    return problems


def _fp16_problems(config: Config, model: Any) -> list[str]:
    problems = []
    if distributed.device().type == "cpu":
        problems.append(
            "precision=fp16 does not run on a CPU, where DeepSpeed has no kernels for it; use precision=bf16."
        )
    elif config.engine.kind != "zero":
        problems.append("precision=fp16 needs the loss scaling of engine=zero1, zero2 or zero3; or use precision=bf16.")
    if getattr(model, "overflows_in_fp16", False) and not config.force_fp16:
        problems.append(
            "precision=fp16 overflows in T5-like models, whose activations exceed its largest number, 65504;"
            " use precision=bf16, or insist with force_fp16=true."
        )
    return problems


def check_evaluation(config: Config, plan: RunPlan, corpus: Corpus) -> None:
    """Refuse splits that cannot be evaluated, before training rather than after. Raises ConfigError or DataError."""
    splits = {"validation"} if config.eval.every else set()
    if config.eval.final_split != "none":
        splits.add(config.eval.final_split)
    corpus.check("train")
    for split in sorted(splits):
        corpus.check(split)
        available = len(corpus.evaluation_samples(split, 0, 1, max_samples=plan.world_size))
        limit = config.eval.max_samples if split == "validation" else None
        check_enough_samples(split, available, limit, plan.world_size)


def make_engine(config: Config, plan: RunPlan, build_model: BuildModel, layout: Layout) -> Engine:
    """The engine that `config.engine` names, holding this rank's part of a model without meaningful weights."""
    dtype = DTYPES[config.precision]
    slices: dict[str, Slice] = {}

    def build_light() -> torch.nn.Module:
        model = build_model()
        slices.update(split_model(model, layout))
        return lighten(model, config.engine.recompute, config.engine.offload_activations)

    if config.engine.kind == "zero":
        from trainer.engine.zero import ZeroEngine  # DeepSpeed takes seconds to import

        def build_in_dtype() -> torch.nn.Module:
            return build_light().to(dtype) if plan.zero_stage == 3 else build_light()

        engine: Engine = ZeroEngine(
            build_in_dtype,
            lambda named: build_optimizer(config.optimizer, named),
            make_ds_config(plan),
            config.engine.compile,
            layout,
            slices,
            plan.nvme_path,
        )
    else:
        make: Callable[..., Engine] = PlainEngine
        if config.privacy.noise_multiplier is not None:
            make = partial(
                PrivateEngine,
                noise_multiplier=config.privacy.noise_multiplier,
                sample_norm=config.privacy.clip_norm,
                global_size=config.batch.global_size,
            )
        engine = make(
            build_light(),
            lambda named: build_optimizer(config.optimizer, named),
            dtype,
            config.clip_norm,
            config.engine.compile,
            layout,
            slices,
        )
    return with_average(engine, config.ema)
