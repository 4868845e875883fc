"""Generating text: beam search and sampling, batched, over any model that can decode step by step.

Both give lists of ids without the start, end and padding tokens, and must be called under `torch.inference_mode()`.
A result depends on its own row of the batch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.models.base import DecoderState, GeneratingModel
from trainer.tasks import Decoding

AllFinished = Callable[[bool], bool]
"""Called once before each decoding step with "this rank is done"; True when every rank is. Ranks that share a sharded
model go on together: one that is done keeps running the model on a single row until this says True."""

Batch = Mapping[str, Tensor]

Begin = int | Sequence[int]
"""What a text begins with: a token, or several, of which it is the continuation."""


@dataclass(frozen=True, slots=True)
class BeamOptions:
    """beam_size: hypotheses kept open per sentence, 1 = greedy; max_length: tokens at most, the end token included.

    max_length_ratio: if set, also at most this times the source's length + `max_length_offset`.
    length_penalty: alpha; hypotheses are ranked by log P(Y) / penalty, 0 = none. length_penalty_kind: "gnmt" divides by
    ((5 + |Y|) / 6)^alpha (Wu et al. 2016, eq. 14), "power" by |Y|^alpha, as transformers does; |Y| counts the end
    token. The search being exact (see `beam_search`), "power" finds what transformers does with early_stopping="never".
    """

    beam_size: int = 4
    max_length: int = 128
    max_length_ratio: float | None = None
    max_length_offset: int = 10
    length_penalty: float = 0.6
    length_penalty_kind: Literal["gnmt", "power"] = "gnmt"

    def __post_init__(self) -> None:
        problems = []
        if self.beam_size < 1:
            problems.append(f"beam_size={self.beam_size} keeps no hypothesis; use 1 (greedy) or more.")
        if self.max_length < 1:
            problems.append(f"max_length={self.max_length} leaves no room for a token; use 1 or more.")
        if self.length_penalty < 0:
            problems.append(f"length_penalty={self.length_penalty} is negative; use 0 (none) or more.")
        if self.length_penalty_kind not in ("gnmt", "power"):
            problems.append(f"length_penalty_kind={self.length_penalty_kind} is none; use gnmt or power.")
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """temperature: logits are divided by it, 0 = the likeliest token; max_length: tokens at most, the end token
    included.

    top_k: sample among the k likeliest (Fan et al. 2018); top_p: among the fewest that hold probability p (Holtzman et
    al. 2020).
    """

    max_length: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.max_length < 1:
            problems.append(f"max_length={self.max_length} leaves no room for a token; use 1 or more.")
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature} is negative; use 0 (likeliest token) or more.")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k={self.top_k} leaves no token to choose; use 1 or more, or null.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} is no probability; use a number above 0, up to 1, or null.")
        if problems:
            raise ConfigError(*problems)


def chosen(how: Decoding, beams: BeamOptions) -> BeamOptions | SampleOptions:
    """`beams`, or where `how` asks for it sampling of as many tokens. Raises ConfigError for options that cannot be."""
    if not how.samples:
        return beams
    temperature = 1.0 if how.temperature is None else how.temperature
    return SampleOptions(beams.max_length, temperature, how.top_k, how.top_p)


def write(
    model: GeneratingModel,
    batch: Batch,
    special_ids: tuple[Begin, int, int],
    options: BeamOptions | SampleOptions,
    seed: int,
    all_finished: AllFinished | None = None,
) -> list[list[int]]:
    """`beam_search` or `sample`, by the kind of `options`. special_ids: begin, end and padding; seed: of sampling."""
    begin, eos_id, pad_id = special_ids
    if isinstance(options, BeamOptions):
        return beam_search(model, batch, begin, eos_id, pad_id, options, all_finished)
    device = next(iter(batch.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    return sample(model, batch, begin, eos_id, options, generator, all_finished)


def beam_search(
    model: GeneratingModel,
    batch: Batch,
    begin: Begin,
    eos_id: int,
    pad_id: int,
    options: BeamOptions,
    all_finished: AllFinished | None = None,
) -> list[list[int]]:
    """The best hypothesis of each sample of `batch` (see the models' contract, without decoder input).

    A hypothesis ends with the end token or, unfinished, at its longest length. The search of a sentence stops when no
    open hypothesis can still beat the best ended one, and its rows leave the batch. Under the penalised score that is
    exact: log P only falls, so an open hypothesis is worth at most its log P over the largest penalty. `max_length` is
    cut to the model's `max_positions`.
    """
    state = model.start_decoding(batch)
    first_ids = _first_ids(model, state, batch, begin)
    idle = _Idle(model, state, first_ids)
    beams = _Beams(first_ids, _limits(model, batch, options, begin), eos_id, pad_id, options)
    agree = all_finished or _alone
    while not agree(beams.done):
        if beams.done:
            idle.step()
            continue
        rows = beams.advance(model.decode_step(state, beams.last_ids))
        if rows is not None:
            state = state.select(rows)
    return beams.best


def sample(
    model: GeneratingModel,
    batch: Batch,
    begin: Begin,
    eos_id: int,
    options: SampleOptions,
    generator: torch.Generator | None = None,
    all_finished: AllFinished | None = None,
) -> list[list[int]]:
    """One random continuation of each sample: decoder-only models continue `input_ids`, others go on with `begin`."""
    state = model.start_decoding(batch)
    ids = _first_ids(model, state, batch, begin)
    idle = _Idle(model, state, ids)
    agree = all_finished or _alone
    length = _longest(model, batch, options.max_length, begin)
    open_rows = torch.arange(len(ids), device=ids.device)
    results: list[list[int]] = [[] for _ in range(len(ids))]
    step = 0
    while not agree(done := len(open_rows) == 0 or step == length):
        if done:
            idle.step()
            continue
        ids = _draw(model.decode_step(state, ids).float(), options, generator)
        step += 1
        going_on = ids != eos_id
        for row, token in zip(open_rows[going_on].tolist(), ids[going_on].tolist(), strict=True):
            results[row].append(token)
        if not bool(going_on.all()):
            kept = going_on.nonzero()[:, 0]
            open_rows, ids = open_rows[kept], ids[kept]
            if len(kept):
                state = state.select(kept)
    return results


def _alone(done: bool) -> bool:
    return done


def _first_ids(model: GeneratingModel, state: DecoderState, batch: Batch, begin: Begin) -> Tensor:
    """The last token of what each row begins with; `state` has taken in what is before it."""
    if state.first_ids is not None:
        return state.first_ids
    some = next(iter(batch.values()))
    *before, last = [torch.full((len(some),), id_, dtype=torch.int64, device=some.device) for id_ in _ids(begin)]
    for ids in before:
        model.decode_step(state, ids)
    return last


def _ids(begin: Begin) -> Sequence[int]:
    return (begin,) if isinstance(begin, int) else begin


def _longest(model: GeneratingModel, batch: Batch, max_length: int, begin: Begin) -> int:
    """`max_length`, or what the model's positions leave for the continuation."""
    if model.max_positions is None:
        return max_length
    prompt = (batch["input_ids"].shape[1] if "input_ids" in batch else len(_ids(begin))) - 1
    return max(1, min(max_length, model.max_positions - prompt))


def _limits(model: GeneratingModel, batch: Batch, options: BeamOptions, begin: Begin) -> Tensor:
    """[N] int64: how many tokens each sample may get."""
    some = next(iter(batch.values()))
    longest = torch.full((len(some),), _longest(model, batch, options.max_length, begin), device=some.device)
    if options.max_length_ratio is None or "source_mask" not in batch:
        return longest
    scaled = (batch["source_mask"].sum(dim=1) * options.max_length_ratio).long() + options.max_length_offset
    return torch.minimum(longest, scaled.clamp(min=1))


def _draw(logits: Tensor, options: SampleOptions, generator: torch.Generator | None) -> Tensor:
    """One id [R] per row of logits [R,V] in fp32."""
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    logits, order = (logits / options.temperature).sort(dim=-1, descending=True)
    probabilities = logits.softmax(dim=-1)
    if options.top_k is not None:
        probabilities[:, options.top_k :] = 0.0
    if options.top_p is not None:
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, chosen)[:, 0]


class _Idle:
    """Runs the model on one row, always at the same position, for ranks that wait for others."""

    def __init__(self, model: GeneratingModel, state: DecoderState, first_ids: Tensor) -> None:
        self._model = model
        self._ids = first_ids[:1]
        self._row = torch.zeros_like(self._ids)
        self._state = state.select(self._row)

    def step(self) -> None:
        self._model.decode_step(self._state.select(self._row), self._ids)


class _Beams:
    """The open hypotheses of the N sentences still searched, W each, and the best ended one of every sentence."""

    def __init__(self, first_ids: Tensor, limits: Tensor, eos_id: int, pad_id: int, options: BeamOptions) -> None:
        num_sentences, device = len(first_ids), first_ids.device
        self._eos_id, self._pad_id, self._options = eos_id, pad_id, options
        self._limits = limits
        self._sentences = torch.arange(num_sentences, device=device)
        self._scores = torch.zeros(num_sentences, 1, device=device)
        self._tokens = first_ids.new_empty(num_sentences, 1, 0)
        self._best_scores = torch.full((num_sentences,), -torch.inf, device=device)
        self._last_ids = first_ids
        self.best: list[list[int]] = [[] for _ in range(num_sentences)]

    @property
    def done(self) -> bool:
        """Every sentence is."""
        return len(self._sentences) == 0

    @property
    def last_ids(self) -> Tensor:
        """[N x W] the tokens to feed next."""
        return self._last_ids

    def advance(self, logits: Tensor) -> Tensor | None:
        """Extend every hypothesis by logits [N x W, V]; the rows [N' x W'] to go on with; None: the same or none."""
        scores, parents, tokens = self._candidates(logits.float())
        length = self._tokens.shape[2] + 1
        at_limit = self._limits == length
        ended = (tokens == self._eos_id) | at_limit[:, None]
        self._record(scores / self._penalty(length), parents, tokens, ended)
        scores = scores.masked_fill(ended, -torch.inf)
        scores, chosen = scores.topk(min(self._options.beam_size, scores.shape[1]), dim=1)
        parents, tokens = parents.gather(1, chosen), tokens.gather(1, chosen)
        hopeless = self._best_scores >= scores[:, 0] / self._penalty(self._limits)
        if self._options.beam_size == 1:  # greedy: it does not go on with the runner-up of the end token
            hopeless |= ended[:, 0]
        kept = (~(hopeless | at_limit)).nonzero()[:, 0]
        rows = (kept[:, None] * self._tokens.shape[1] + parents[kept]).flatten()
        same_rows = len(rows) == len(self._last_ids) and bool((rows[1:] > rows[:-1]).all())
        history = self._tokens[kept[:, None], parents[kept]]
        self._tokens = torch.cat((history, tokens[kept][:, :, None]), dim=2)
        self._scores, self._limits = scores[kept], self._limits[kept]
        self._sentences, self._best_scores = self._sentences[kept], self._best_scores[kept]
        self._last_ids = tokens[kept].flatten()
        return None if self.done or same_rows else rows

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The 2 x beam_size likeliest extensions of each sentence, best first: log P, hypothesis, token, each [N, C].

        Twice as many as beams, for at most half of them end.
        """
        num_sentences, width = self._scores.shape
        if self._pad_id != self._eos_id:
            logits[:, self._pad_id] = -torch.inf
        values, ids = logits.topk(min(2 * self._options.beam_size, logits.shape[1]), dim=1)
        log_probs = values - logits.logsumexp(dim=1, keepdim=True)
        per_row = values.shape[1]
        extended = (self._scores[:, :, None] + log_probs.view(num_sentences, width, per_row)).flatten(1)
        scores, flat = extended.topk(min(2 * self._options.beam_size, extended.shape[1]), dim=1)
        return scores, flat // per_row, ids.view(num_sentences, -1).gather(1, flat)

    def _record(self, scores: Tensor, parents: Tensor, tokens: Tensor, ended: Tensor) -> None:
        """Keep the best of the ended candidates; one that ends below the first beam_size ranks was not in the beam."""
        in_beam = torch.arange(scores.shape[1], device=scores.device) < self._options.beam_size
        scores, chosen = scores.masked_fill(~(ended & in_beam), -torch.inf).max(dim=1)
        for index in (scores > self._best_scores).nonzero()[:, 0].tolist():
            candidate = int(chosen[index])
            ids = [*self._tokens[index, parents[index, candidate]].tolist(), int(tokens[index, candidate])]
            self.best[int(self._sentences[index])] = ids[:-1] if ids[-1] == self._eos_id else ids
        self._best_scores = torch.maximum(self._best_scores, scores)

    def _penalty(self, length: int | Tensor) -> float | Tensor:
        base = (5 + length) / 6 if self._options.length_penalty_kind == "gnmt" else length
        return base**self._options.length_penalty
