"""Evaluation of a split by all ranks together; also `python -m trainer.evaluate run=NAME [split=test]`.

Every sample is weighted by its target tokens and every sentence is scored exactly once, however unevenly the ranks
share them: a rank without samples takes part in every collective, and where a forward pass is one (ZeRO-3) it runs
blank batches.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from trainer import distributed
from trainer.commands import run_command
from trainer.errors import ConfigError, DataError, SetupError
from trainer.guards import watchdog
from trainer.host import keep_compiled_products, keep_freed_memory
from trainer.tasks import IGNORE, Batch, Encoded, Record, ScoresBatches, ScoresText, Task

if TYPE_CHECKING:
    from trainer.plan import RunPlan

MAX_SENTENCES = 64
"""Sentences decoded at once on a rank: beams multiply the rows, and caches the memory."""

T = TypeVar("T")


class Sample(Protocol):
    """What the data layer gives for evaluation: the place in the split, the record, and what the task made of it."""

    @property
    def index(self) -> int: ...
    @property
    def record(self) -> Record: ...
    @property
    def encoded(self) -> Encoded: ...
    @property
    def task(self) -> Task: ...


class EvaluationData(Protocol):
    """Where the samples come from (see `trainer.data.corpus.Corpus`)."""

    def evaluation_samples(
        self, split: str, rank: int, world_size: int, max_samples: int | None
    ) -> Sequence[Sample]: ...


class Evaluated(Protocol):
    """What evaluation needs of an engine (see `trainer.engine.base.Engine`)."""

    @property
    def module(self) -> torch.nn.Module: ...
    @property
    def model(self) -> torch.nn.Module: ...
    @property
    def ranks_must_step_together(self) -> bool: ...

    def evaluating(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to evaluate. plan: its micro-batch is the size of the forward passes; final: also write evaluation.json."""

    split: str
    max_samples: int | None
    plan: RunPlan
    generate: bool = True
    final: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """metrics: `eval/...` numbers; signatures: how scores were computed; generations: the file of sentences, if any."""

    metrics: dict[str, float]
    signatures: dict[str, str] = field(default_factory=dict)
    generations: Path | None = None


def evaluate(
    engine: Evaluated, task: Task, corpus: EvaluationData, evaluation: Evaluation, directory: Path, step: int
) -> dict[str, float]:
    """The metrics of `evaluate_fully`, the same on all ranks."""
    return evaluate_fully(engine, task, corpus, evaluation, directory, step).metrics


def evaluate_fully(
    engine: Evaluated, task: Task, corpus: EvaluationData, evaluation: Evaluation, directory: Path, step: int
) -> Result:
    """Called by all ranks together; all return the same.

    eval/loss: negative log-likelihood in nats per target token over the whole split (without label smoothing);
    eval/accuracy: share of target tokens (or classes) that are the arg max; eval/perplexity = exp(loss) and
    eval/bits_per_byte for text; the task's own scores of batches and of generated text; eval/samples; eval/seconds.
    Raises DataError if the split has no sample, SetupError if the run directory cannot be written.
    """
    started = time.perf_counter()
    # Ranks that share the model's matrices pass the same samples forward together, and the first of them counts them.
    copies = evaluation.plan.tensor_parallel
    part, parts = distributed.rank() // copies, distributed.world_size() // copies
    counted = distributed.rank() % copies == 0
    found: Sequence[Sample] = corpus.evaluation_samples(evaluation.split, part, parts, evaluation.max_samples)
    samples = sorted(found, key=lambda sample: (sample.encoded.length, sample.index))
    blank = _any_sample(samples, evaluation.split)
    with engine.evaluating():
        result = Result(_token_metrics(engine, task, samples, blank, evaluation.plan, counted))
        if evaluation.generate and isinstance(task, ScoresText):
            lines = _translate(engine, task, samples, blank, counted)
            path = generations_path(directory, evaluation.split, step)
            scores = distributed.on_rank_zero(lambda: _score_and_write(task, lines, path))
            result = Result(
                result.metrics
                | {f"eval/{name}": value for name, value in scores.items() if not isinstance(value, str)},
                {name: value for name, value in scores.items() if isinstance(value, str)},
                path,
            )
    result.metrics["eval/samples"] = int(distributed.all_reduce_sum([len(samples) * counted])[0])
    (result.metrics["eval/seconds"],) = distributed.all_reduce_max([time.perf_counter() - started])
    if evaluation.final:
        summary = {"step": step, "split": evaluation.split, **result.metrics, **result.signatures}
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        distributed.on_rank_zero(lambda: write_atomically(directory / "evaluation.json", text))
    return result


def check_enough_samples(split: str, num_samples: int, max_samples: int | None, world_size: int) -> None:
    """Refuse more ranks than samples to evaluate; to be called before training.

    num_samples: usable samples of the split, counted up to `world_size`. Raises DataError for none and ConfigError for
    too few, with the numbers and what to do.
    """
    if num_samples == 0:
        raise _no_sample(split)
    if num_samples < world_size:
        raise ConfigError(
            f"The split {split} has {num_samples} samples for {world_size} ranks; use at most {num_samples} ranks."
        )
    if max_samples is not None and max_samples < world_size:
        raise ConfigError(
            f"eval.max_samples={max_samples} is less than the {world_size} ranks; use at least {world_size}."
        )


def _no_sample(split: str) -> DataError:
    return DataError(f"The split {split} has no usable sample; check data.{split} and the task's columns and limits.")


def generations_path(directory: Path, split: str, step: int) -> Path:
    """generations/step_00000200.jsonl for the validation split, with the split's name before .jsonl for any other."""
    suffix = "" if split == "validation" else f".{split}"
    return directory / "generations" / f"step_{step:08d}{suffix}.jsonl"


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or leave the old one. Raises SetupError where the folder cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise SetupError(f"Cannot write {path}: {error.strerror}; check the folder's permissions and space.") from error


def _any_sample(samples: Sequence[Sample], split: str) -> Encoded:
    """A sample for blank batches: the first of the first rank that has one."""
    offered = distributed.all_gather_objects(samples[0].encoded if samples else None)
    for sample in offered:
        if sample is not None:
            return sample
    raise _no_sample(split)


def _token_metrics(
    engine: Evaluated, task: Task, samples: Sequence[Sample], blank: Encoded, plan: RunPlan, counted: bool
) -> dict[str, float]:
    nll = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    scores: dict[str, tuple[float, float]] = {}
    for batch_samples in _in_step(engine, _micro_batches(samples, plan)):
        watchdog.progress()
        batch = task.collate([sample.encoded for sample in batch_samples] or [blank])
        if not batch_samples:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
        batch = _on_device(batch)
        sums = task.loss(engine.model, batch)
        nll += sums.nll.cpu()
        counts += torch.stack([sums.num_target_tokens, sums.num_correct]).cpu()
        if isinstance(task, ScoresBatches):
            _add(scores, task.batch_scores(engine.model, batch))
    num_bytes = sum(sample.task.target_bytes(sample.record, sample.encoded) for sample in samples)
    own = [float(nll), *map(float, counts), float(num_bytes)]
    totals = distributed.all_reduce_sum(own if counted else [0.0] * len(own))
    nll_sum, num_target_tokens, num_correct, total_bytes = totals
    loss = nll_sum / num_target_tokens
    metrics = {"eval/loss": loss, "eval/accuracy": num_correct / num_target_tokens}
    if total_bytes:
        metrics["eval/perplexity"] = math.exp(min(loss, 700.0))  # the largest that a float holds
        metrics["eval/bits_per_byte"] = nll_sum / math.log(2.0) / total_bytes
    return metrics | _means(scores if counted else {})


def _add(totals: dict[str, tuple[float, float]], more: Mapping[str, tuple[float, float]]) -> None:
    for name, (value, count) in more.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = before[0] + value, before[1] + count


def _means(own: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The means of all ranks' sums, as metrics; a rank without a batch knows no names."""
    totals: dict[str, tuple[float, float]] = {}
    for part in distributed.all_gather_objects(dict(own)):
        _add(totals, part)
    return {f"eval/{name}": value / count for name, (value, count) in totals.items() if count}


def _translate(
    engine: Evaluated, task: ScoresText, samples: Sequence[Sample], blank: Encoded, counted: bool
) -> list[tuple[int, str, str, str]]:
    """(index, source, reference, hypothesis) of all ranks' samples, in the order of the split."""
    all_finished = distributed.every_rank if engine.ranks_must_step_together else None
    mine: list[tuple[int, str, str, str]] = []
    for batch_samples in _in_step(engine, _chunks(samples, MAX_SENTENCES)):
        watchdog.progress()
        encoded = [sample.encoded for sample in batch_samples] or [blank]
        texts = task.generate(engine.module, encoded, all_finished)
        for sample, hypothesis in zip(batch_samples, texts, strict=False):  # a blank batch has a text but no sample
            assert isinstance(sample.task, ScoresText), "the tasks of all sources are of one kind"
            mine.append((sample.index, *sample.task.source_and_reference(sample.record), hypothesis))
    lines = sorted(line for part in distributed.all_gather_objects(mine if counted else []) for line in part)
    assert len({line[0] for line in lines}) == len(lines), "a sentence was scored twice"
    return lines


def _score_and_write(
    task: ScoresText, lines: Sequence[tuple[int, str, str, str]], path: Path
) -> dict[str, float | str]:
    _, sources, references, hypotheses = zip(*lines, strict=True)
    rows = (
        {"source": source, "reference": reference, "hypothesis": hypothesis}
        for _, source, reference, hypothesis in lines
    )
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return task.score(hypotheses, references, sources)


def _in_step(engine: Evaluated, batches: list[list[Sample]]) -> list[list[Sample]]:
    """The batches, and after them empty ones where every rank must run as many as the busiest."""
    if not engine.ranks_must_step_together:
        return batches
    (most,) = distributed.all_reduce_max([len(batches)])
    return batches + [[] for _ in range(int(most) - len(batches))]


def _micro_batches(samples: Sequence[Sample], plan: RunPlan) -> list[list[Sample]]:
    """`samples`, sorted by length, in forward passes of the plan's samples or padded positions."""
    if plan.micro_tokens is None:
        assert plan.micro_size is not None, "a plan has one of the two"
        return _chunks(samples, plan.micro_size)
    batches: list[list[Sample]] = []
    for sample in samples:
        positions = 2 * sample.encoded.length  # source and target; lengths ascend, so the last is the longest
        if not batches or (len(batches[-1]) + 1) * positions > plan.micro_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def _chunks(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _on_device(batch: Batch) -> Batch:
    where = distributed.device()
    return {name: tensor.to(where) for name, tensor in batch.items()}


@dataclass(frozen=True)
class EvaluateOptions:
    """Arguments of `python -m trainer.evaluate`."""

    run: str
    split: str = "test"
    runs_dir: str = "runs"
    checkpoint: str = "latest"
    weights: str = "master"
    allow_targets: list[str] = field(default_factory=list)
    max_samples: int | None = None
    generate: bool = True
    json: bool = False


@dataclass(frozen=True, slots=True)
class _RestoredEngine:
    """A restored model in the engine's clothes: it is in evaluation mode already and steps alone."""

    module: torch.nn.Module
    ranks_must_step_together: bool = False

    @property
    def model(self) -> torch.nn.Module:
        return self.module

    def evaluating(self) -> AbstractContextManager[None]:
        return torch.inference_mode()


def _evaluate_run(options: EvaluateOptions) -> None:
    from trainer.plan import make_plan
    from trainer.restore import restore_run

    keep_compiled_products()
    keep_freed_memory()
    with distributed.process_group():
        found = options.run, options.runs_dir, options.checkpoint, options.allow_targets, options.weights
        restored = restore_run(*found)
        evaluation = Evaluation(options.split, options.max_samples, make_plan(restored.config, 1), options.generate)
        result = evaluate_fully(
            _RestoredEngine(restored.model),
            restored.task,
            restored.corpus,
            evaluation,
            restored.directory.path,
            restored.step,
        )
        if distributed.rank() == 0:
            print(_report(options, restored.step, result), flush=True)
            from trainer.metrics.wandb.lineage import tell

            run = restored.config, restored.directory.path, restored.steps
            tell("evaluate", *run, vars(options), result.metrics, result.generations)


def _report(options: EvaluateOptions, step: int, result: Result) -> str:
    facts: dict[str, object] = {"run": options.run, "step": step, "split": options.split}
    facts |= {"checkpoint": options.checkpoint} if options.checkpoint.startswith("average:") else {}
    facts |= {"weights": options.weights} if options.weights != "master" else {}
    facts |= {**result.metrics, **result.signatures}
    if result.generations is not None:
        facts["generations"] = str(result.generations)
    if options.json:
        return json.dumps(facts, ensure_ascii=False)
    width = max(map(len, facts))
    return "\n".join(
        f"{name:<{width}}  {f'{value:.4f}' if isinstance(value, float) else value}" for name, value in facts.items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(EvaluateOptions, _evaluate_run, str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
