"""Preference tuning: of two answers the model comes to prefer the one that people chose (DPO, Rafailov et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer.data.sources import column
from trainer.errors import ConfigError, DataError
from trainer.tasks import IGNORE, BadRecord, Batch, Encoded, LossSums, Record
from trainer.tasks.chat import Chat, labels_of
from trainer.tasks.chat_template import Message
from trainer.tasks.conversation import ChatTokenizer, Tokens, as_messages
from trainer.tasks.loss import sequence_log_probs
from trainer.tasks.text import next_token_batch, num_unmasked, text_at

if TYPE_CHECKING:
    import numpy.typing as npt

Conversation = list[Message]


class Preference:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7), each pair weighing the same.

    -log sigmoid(beta (log p(chosen) / r(chosen) - log p(rejected) / r(rejected))), p being the model trained and r the
    reference: the model that training began with. r does not change, so its log-probabilities come as numbers with the
    records (`python -m trainer.reference_scores` writes them), and no second model is in memory.

    `prompt_column` holds what the user says, or a list of messages; `chosen_column` and `rejected_column` two answers.
    One "target token" is one pair: eval/loss is the mean loss of a pair, and eval/accuracy and eval/reward_accuracy the
    share of pairs whose chosen answer has the higher reward, beta log p / r. Longer pairs are skipped and counted.
    """

    splits_positions = False
    """Ranks cannot share a sequence: the loss is no sum over positions."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        prompt_column: str = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        reference_columns: Sequence[str] = ("chosen_logp", "rejected_logp"),
        beta: float = 0.1,
        chat_template: str | None = None,
        system: str | None = None,
        sequence_length: int = 1024,
        temperature: float = 0.8,
        top_k: int = 40,
    ) -> None:
        """reference_columns: log r of both answers, in nats; empty: r holds all answers for equally likely.

        chat_template, system, sequence_length, temperature, top_k: as in `Chat`. Raises ConfigError for options that
        cannot be.
        """
        if beta <= 0:
            raise ConfigError(f"task.beta={beta} must be above 0; 0.1 is usual.")
        if len(reference_columns) not in (0, 2):
            raise ConfigError(
                f"task.reference_columns={list(reference_columns)}: name two columns, for the chosen and for the"
                " rejected answer, or none."
            )
        self.required_columns = (prompt_column, chosen_column, rejected_column)
        self.max_length: int | None = sequence_length
        self._reference_columns = tuple(reference_columns)
        self._beta = beta
        self._pad_id = tokenizer.pad_id
        self._sequence_length = sequence_length
        self._chat = Chat(
            tokenizer,
            chat_template=chat_template,
            system=system,
            sequence_length=sequence_length,
            temperature=temperature,
            top_k=top_k,
        )

    @property
    def chat_template(self) -> str:
        """See `Chat.chat_template`."""
        return self._chat.chat_template

    @property
    def end_id(self) -> int:
        """See `Chat.end_id`."""
        return self._chat.end_id

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`chosen_ids`, `rejected_ids` int32; `chosen_labels`, `rejected_labels` int64; `reference` float32 [2].

        Raises DataError where the columns of the reference are missing.
        """
        pairs = [self._pair(record) for record in records]
        sides = [
            self._chat.conversations.encode(
                [pair if isinstance(pair, BadRecord) else pair[side] for pair in pairs], last_answer_only=True
            )
            for side in (0, 1)
        ]
        return [self._join(record, *both) for record, *both in zip(records, *sides, strict=True)]

    def _pair(self, record: Record) -> tuple[Conversation, Conversation] | BadRecord:
        prompt_column, *answer_columns = self.required_columns
        prompt = _prompt(record, prompt_column)
        if isinstance(prompt, BadRecord):
            return prompt
        conversations = []
        for path in answer_columns:
            answer = text_at(record, path)
            if isinstance(answer, BadRecord):
                return answer
            conversations.append([*prompt, {"role": "assistant", "content": answer}])
        return conversations[0], conversations[1]

    def _join(self, record: Record, chosen: Tokens | BadRecord, rejected: Tokens | BadRecord) -> Encoded | BadRecord:
        for side in (chosen, rejected):
            if isinstance(side, BadRecord):
                return side
        assert isinstance(chosen, Tokens) and isinstance(rejected, Tokens)
        length = max(len(chosen.ids), len(rejected.ids)) - 1
        if length > self._sequence_length:
            return BadRecord(f"{length} tokens are more than task.sequence_length={self._sequence_length}")
        reference = self._reference(record)
        if isinstance(reference, BadRecord):
            return reference
        fields: dict[str, npt.NDArray[Any]] = {
            "chosen_ids": np.asarray(chosen.ids[:-1], np.int32),
            "chosen_labels": labels_of(chosen),
            "rejected_ids": np.asarray(rejected.ids[:-1], np.int32),
            "rejected_labels": labels_of(rejected),
            "reference": np.asarray(reference, np.float32),
        }
        return Encoded(fields, length, num_target_tokens=1)

    def _reference(self, record: Record) -> list[float] | BadRecord:
        values = []
        for path in self._reference_columns:
            try:
                value = column(record, path)
            except KeyError:
                raise DataError(
                    f"There is no column {path} with the log-probabilities of the reference; write it with python -m"
                    " trainer.reference_scores run=NAME data=PATH to=FOLDER, where NAME is the run that init_from"
                    " names, and set data.path=FOLDER."
                ) from None
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                return BadRecord(f"column '{path}' holds {value!r}, not a log-probability")
            values.append(float(value))
        return values or [0.0, 0.0]

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Always one."""
        return [sample]

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`input_ids`, `attention_mask`, `labels` [2B,T], `reference` [2B] float32.

        Rows 2 i and 2 i + 1 are the chosen and the rejected answer of sample i.
        """
        both = [(sample, side) for sample in samples for side in ("chosen", "rejected")]
        batch = next_token_batch(
            [sample.fields[f"{side}_ids"] for sample, side in both],
            [sample.fields[f"{side}_labels"] for sample, side in both],
            self._pad_id,
        )
        batch["reference"] = torch.from_numpy(np.concatenate([sample.fields["reference"] for sample in samples]))
        return batch

    def log_probs(self, model: Any, batch: Batch) -> torch.Tensor:
        """[B,2] fp32: log-probabilities in nats of the chosen and the rejected answers, their ends included."""
        return sequence_log_probs(model(batch), batch["labels"]).view(-1, 2)

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """The loss summed over the pairs."""
        is_pair, margins = self._margins(self.log_probs(model, batch), batch)
        objective = (-F.logsigmoid(margins)).masked_fill(~is_pair, 0.0).sum()
        num_correct = ((margins > 0) & is_pair).sum()
        return LossSums(objective, objective.detach(), is_pair.sum(), num_correct)

    def _margins(self, log_probs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each pair whether it is one (a blank is not), and the chosen reward less the rejected one."""
        is_pair = (batch["labels"] != IGNORE).any(dim=1)[::2]
        rewards = self._beta * (log_probs - batch["reference"].view(-1, 2))
        return is_pair, rewards[:, 0] - rewards[:, 1]

    def batch_scores(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """See `ScoresBatches`: reward_accuracy, reward_margin, and the rewards of both sides."""
        log_probs = self.log_probs(model, batch).detach()
        is_pair, margins = self._margins(log_probs, batch)
        chosen, rejected = (self._beta * (log_probs - batch["reference"].view(-1, 2))).unbind(dim=1)
        found = {"reward_accuracy": (margins > 0).float(), "reward_margin": margins}
        found |= {"chosen_reward": chosen, "rejected_reward": rejected}
        count = float(is_pair.sum())
        return {name: (float(values.masked_fill(~is_pair, 0.0).sum()), count) for name, values in found.items()}

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """Positions of both answers, with the prompt each."""
        total = batch["labels"].numel()
        return total, total - num_unmasked(batch)

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """The side of the rectangle, which has two rows for each pair."""
        return {"target_length": batch["labels"].shape[1]}

    def headline(self) -> tuple[str, str]:
        """The loss."""
        return "eval/loss", "min"

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """A preference spells no text."""
        return 0

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded | BadRecord]:
        """See `Chat`."""
        return self._chat.encode_prompts(texts)

    def generate(self, model: Any, samples: Sequence[Encoded], *arguments: Any, **options: Any) -> list[str]:
        """See `Chat`."""
        return self._chat.generate(model, samples, *arguments, **options)


def _prompt(record: Record, path: str) -> Conversation | BadRecord:
    """What stands before the answer: messages, or a text that the user says."""
    try:
        value = column(record, path)
    except KeyError:
        return BadRecord(f"column '{path}' is missing")
    if isinstance(value, list):
        return as_messages(value, f"column '{path}'")
    text = text_at(record, path)
    return text if isinstance(text, BadRecord) else [{"role": "user", "content": text}]
