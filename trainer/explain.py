"""Why a translation is what it is: `python -m trainer.explain run=NAME text="A sentence." [output=explain.png]`.

Writes a PNG with a row for each token of the translation and a column for each token of the source.
kind=attention: the weights of the decoder's attention over the source, the mean over heads and over layers, or over the
heads of layer=N (from 1). kind=attribution: by how much each source token raises or lowers the logit of the token
written (integrated gradients, Sundararajan et al. 2017, against a source of padding tokens). The translation is the
run's own, its tokens those of the tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.commands import run_command
from trainer.errors import ConfigError, DataError, SetupError
from trainer.models.attention import CrossAttention, attend
from trainer.tasks import BadRecord, Batch, Encoded, GeneratesText

if TYPE_CHECKING:
    from trainer.data.tokenizer import Tokenizer
    from trainer.restore import RestoredRun

STEPS = 64
"""Points of the path from the baseline to the source at which gradients are taken."""

_ROWS = 256
"""Source tokens times points that pass forward at once."""


@dataclass(frozen=True)
class ExplainOptions:
    """Arguments of `python -m trainer.explain`."""

    run: str
    text: str
    output: str = "explain.png"
    kind: str = "attention"
    layer: int | None = None
    runs_dir: str = "runs"
    checkpoint: str = "latest"
    allow_targets: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Explanation:
    """values: [T, S] fp32, of each target token what each source token has to do with it."""

    source: list[str]
    target: list[str]
    values: Tensor


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, every forward pass appends the weights of each cross-attention in turn, [B, H, T, S] fp32.

    The attentions of this one model are told from outside to keep them: training never pays for it.
    """
    weights: list[Tensor] = []

    def recording(module: CrossAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        scores = torch.matmul(q.float() * module.scale, k.float().transpose(-1, -2))
        weights.append(torch.softmax(scores if bias is None else scores + bias, dim=-1))
        return attend(q, k, v, bias, causal, 0.0, module.scale)

    modules = [module for module in model.modules() if isinstance(module, CrossAttention)]
    for module in modules:
        module.attend = partial(recording, module)  # type: ignore[method-assign]
    try:
        yield weights
    finally:
        for module in modules:
            del module.attend  # the class's own shows again


def attention_over_source(model: nn.Module, batch: Batch, layer: int | None) -> Tensor:
    """[T, S] weights of one pair, the mean over heads and layers, or over the heads of `layer` (from 1).

    Every row sums to one. Raises ConfigError where the model has no such layer.
    """
    with recorded_attention(model) as weights, torch.inference_mode():
        model(batch)
    if not weights:
        raise ConfigError(
            f"kind=attention: {type(model).__name__} has no layers of cross-attention; use kind=attribution."
        )
    if layer is not None and not 1 <= layer <= len(weights):
        raise ConfigError(f"layer={layer}: the decoder has the layers 1 to {len(weights)}.")
    chosen = weights if layer is None else [weights[layer - 1]]
    return torch.stack(chosen).mean(dim=(0, 2))[0].cpu()


def attributions(model: nn.Module, batch: Batch, baseline_id: int, steps: int = STEPS) -> Tensor:
    """[T, S] integrated gradients of one pair (Sundararajan et al. 2017, equation 1): by how much each source token
    moves the logit of each target token on the straight path from vectors of `baseline_id` to those of the source.

    A row sums to the logit at the source minus that at the baseline, up to the error of the midpoint rule with `steps`
    points. The model is in evaluation mode, and its parameters need no gradient.
    """
    source_ids, labels = batch["source_ids"], batch["labels"][0]
    begin, end = (_vectors(model, ids) for ids in (torch.full_like(source_ids, baseline_id), source_ids))
    total = torch.zeros(len(labels), source_ids.shape[1])
    points = (torch.arange(steps, device=source_ids.device) + 0.5) / steps
    for part in torch.split(points, max(1, _ROWS // source_ids.shape[1])):
        path = (begin + part[:, None, None] * (end - begin)).requires_grad_()
        logits = _forward_from(model, batch, path)
        chosen = logits.float().gather(2, labels.expand(len(part), -1)[:, :, None])[:, :, 0].sum(dim=0)
        for position, value in enumerate(chosen):
            (gradient,) = torch.autograd.grad(value, path, retain_graph=position + 1 < len(labels))
            total[position] += (gradient * (end - begin)).sum(dim=(0, 2)).cpu() / steps
    return total


def _vectors(model: nn.Module, ids: Tensor) -> Tensor:
    """[1, S, d_model] of source tokens, as the embedding gives them."""
    embedding: Any = model.embedding
    with torch.no_grad():
        vectors: Tensor = embedding(ids)
    return vectors


def _forward_from(model: nn.Module, batch: Batch, vectors: Tensor) -> Tensor:
    """Logits [N, T, V] of the pair in `batch` when its source tokens are embedded as `vectors` [N, S, d_model]."""
    rows = {name: tensor.expand(len(vectors), *tensor.shape[1:]) for name, tensor in batch.items()}
    source = rows["source_ids"]

    def replaced(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return vectors if inputs[0] is source else output

    embedding: Any = model.embedding
    handle = embedding.register_forward_hook(replaced)
    try:
        logits: Tensor = model(rows)
    finally:
        handle.remove()
    return logits


def explain(restored: RestoredRun, text: str, kind: str = "attention", layer: int | None = None) -> Explanation:
    """What the run makes of `text`, and why. The model becomes fp32 and its parameters need no gradients any more.

    Raises ConfigError for a run that does not translate or a layer that is none, DataError for a text it cannot take.
    """
    task, tokenizer, model = restored.task, restored.tokenizer, restored.model
    name = restored.config.name
    if not isinstance(task, GeneratesText):
        raise ConfigError(f"run={name}: its task {type(task).__name__} writes no text that could be explained.")
    assert tokenizer is not None, "a task that writes text has a tokenizer"
    (sample,) = task.encode_prompts([text])
    if isinstance(sample, BadRecord):
        raise DataError(f"text={text!r} cannot be used: {sample.reason}.")
    if "source_ids" not in sample.fields or not hasattr(model, "embedding"):
        raise ConfigError(
            f"run={name}: {type(model).__name__} has no source text apart from what it writes; encoder-decoders have"
            " (task=translation and its like)."
        )
    model = model.float().requires_grad_(False)
    with torch.inference_mode():
        (written,) = task.generate(model, [sample])
    batch = _pair(task, tokenizer, sample, written, next(model.parameters()).device)
    if kind == "attention":
        values = attention_over_source(model, batch, layer)
    else:
        values = attributions(model, batch, tokenizer.pad_id)
    source, target = batch["source_ids"][0].tolist(), batch["labels"][0].tolist()
    return Explanation([_shown(tokenizer, id_) for id_ in source], [_shown(tokenizer, id_) for id_ in target], values)


def _pair(task: Any, tokenizer: Tokenizer, sample: Encoded, written: str, device: torch.device) -> Batch:
    """The source with what was written as its target, as the task would train on them."""
    import numpy as np

    (ids,) = tokenizer.encode_batch([written])
    target = np.asarray([*ids, tokenizer.eos_id], np.int32)
    pair = Encoded({**sample.fields, "target_ids": target}, max(sample.length, len(target)), len(target))
    batch: Batch = task.collate([pair])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _shown(tokenizer: Tokenizer, id_: int) -> str:
    """A token as people read it, spaces as low lines; a part of a character has no text, and shows its name."""
    text = tokenizer.decode([id_]).replace(" ", "\u2581")
    return text if text and text.isprintable() and "\ufffd" not in text else tokenizer.token_of(id_)


def draw(explanation: Explanation, kind: str, title: str, output: Path) -> None:
    """Write the PNG. Raises SetupError without matplotlib, or where the file cannot be written."""
    import warnings

    pyplot = _pyplot()
    rows, columns = explanation.values.shape
    figure, axis = pyplot.subplots(figsize=(2.5 + 0.38 * columns, 1.8 + 0.3 * rows), layout="constrained")
    limit = float(explanation.values.abs().max()) or 1.0
    colours = ("viridis", 0.0) if kind == "attention" else ("RdBu_r", -limit)
    image = axis.imshow(explanation.values.numpy(), cmap=colours[0], vmin=colours[1], vmax=limit, aspect="auto")
    axis.set_xticks(range(columns), explanation.source, rotation=60, ha="right", parse_math=False)
    axis.set_yticks(range(rows), explanation.target, parse_math=False)
    axis.set_title(title, fontsize="medium", parse_math=False)
    figure.colorbar(image, label="weight" if kind == "attention" else "change of the logit")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # of a script that matplotlib's font has not
            figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise SetupError(f"output={output} cannot be written: {error.strerror}; choose another file.") from error
    finally:
        pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SetupError("Drawing needs matplotlib; install shardwright[plots].") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _explain(options: ExplainOptions) -> None:
    problems = []
    if options.kind not in ("attention", "attribution"):
        problems.append(f"kind={options.kind} is not known; use attention or attribution.")
    if options.kind == "attribution" and options.layer is not None:
        problems.append(f"layer={options.layer} is for kind=attention: an attribution is of the whole model.")
    if not options.text.strip():
        problems.append("text= is empty; give a sentence.")
    if problems:
        raise ConfigError(*problems)
    _pyplot()  # before anything is loaded
    from trainer.restore import restore_run

    restored = restore_run(options.run, options.runs_dir, options.checkpoint, options.allow_targets)
    explanation = explain(restored, options.text, options.kind, options.layer)
    layers = "" if options.kind == "attribution" else " of all layers"
    of = layers if options.layer is None else f" of layer {options.layer}"
    draw(explanation, options.kind, f"{options.run}, step {restored.step}: {options.kind}{of}", Path(options.output))
    print(options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ExplainOptions, _explain, str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
