"""Chat and instruction tuning: a language model of conversations that learns the assistant's answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import ConfigError
from trainer.tasks import IGNORE, BadRecord, Encoded, Record
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.chat_template import Message
from trainer.tasks.conversation import ChatTokenizer, Conversations, Tokens, as_messages, messages_at
from trainer.tasks.text import text_at

if TYPE_CHECKING:
    import numpy.typing as npt


class Chat(CausalLM):
    """Next-token cross-entropy on the tokens that the assistant wrote, given all tokens before them.

    A record is a conversation, `messages_column` with a list of {role, content}; or one question and its answer, the
    texts in `prompt_column` and `response_column`. Loss, perplexity and bits per byte are of the answers alone, the
    tokens that end them included. A record longer than `sequence_length` is skipped and counted; cut at its end with
    overlong="truncate"; or cut between an answer and the next question with overlong="split", where each part begins
    with the system message.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        messages_column: str | None = "messages",
        prompt_column: str | None = None,
        response_column: str | None = None,
        chat_template: str | None = None,
        system: str | None = None,
        sequence_length: int = 1024,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        overlong: str = "skip",
        temperature: float = 0.8,
        top_k: int = 40,
    ) -> None:
        """chat_template: a Jinja template, as a text or a file (None: see `chat_template.DEFAULT`); system: the system
        message of conversations without one; temperature, top_k: of the sampling in `generate`.

        Raises ConfigError for options that cannot be.
        """
        pair = [one for one in (prompt_column, response_column) if one is not None]
        if (messages_column is None) == (not pair) or len(pair) == 1:
            raise ConfigError(
                f"task.messages_column={messages_column}, prompt_column={prompt_column},"
                f" response_column={response_column}: a conversation comes from the first, or from the other two;"
                " set what is not there to null."
            )
        columns = (messages_column,) if messages_column is not None else tuple(pair)
        super().__init__(
            tokenizer,
            columns[-1],
            sequence_length,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            overlong=overlong,
            temperature=temperature,
            top_k=top_k,
        )
        self.required_columns = columns
        self.conversations = Conversations(tokenizer, chat_template, system)
        self._end_id = self.conversations.end_id

    @property
    def chat_template(self) -> str:
        """The template's text, which an export gives to the tokenizer."""
        return self.conversations.template_text

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.conversations.end_id

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`ids` int32: what the positions read; `labels` int64: what they predict, IGNORE where others wrote it.

        With overlong="split" a sample may hold several parts, which begin at `starts` int64.
        """
        conversations = [self._messages(record) for record in records]
        return [
            tokens if isinstance(tokens, BadRecord) else self._fit(tokens, messages)
            for tokens, messages in zip(self.conversations.encode(conversations), conversations, strict=True)
        ]

    def _messages(self, record: Record) -> list[Message] | BadRecord:
        if len(self.required_columns) == 1:
            messages = messages_at(record, self.required_columns[0])
            if not isinstance(messages, BadRecord) and all(one["role"] != "assistant" for one in messages):
                return BadRecord(f"column '{self.required_columns[0]}' has no message of the assistant to learn from")
            return messages
        messages = []
        for role, path in zip(("user", "assistant"), self.required_columns, strict=True):
            text = text_at(record, path)
            if isinstance(text, BadRecord):
                return text
            messages.append({"role": role, "content": text})
        return messages

    def _fit(self, tokens: Tokens, messages: list[Message] | BadRecord) -> Encoded | BadRecord:
        limit = self._sequence_length
        if len(tokens.ids) - 1 <= limit:
            return _sample([tokens])
        assert isinstance(messages, list), "a bad record has no tokens"
        if self._overlong == "split":
            parts = self._parts(messages)
            return parts if isinstance(parts, BadRecord) else _sample(parts)
        if self._overlong == "truncate":
            cut = Tokens(tokens.ids[: limit + 1], tokens.learned[: limit + 1])
            if any(cut.learned[1:]):
                return _sample([cut])
            return BadRecord(f"the first task.sequence_length={limit} tokens have none of an answer")
        return BadRecord(
            f"{len(tokens.ids) - 1} tokens are more than task.sequence_length={limit} (task.overlong=skip)"
        )

    def _parts(self, messages: list[Message]) -> list[Tokens] | BadRecord:
        """The conversation in as few parts as fit, cut behind answers; each begins with the system message."""
        head = messages[:1] if messages[0]["role"] == "system" else []
        exchanges: list[list[Message]] = [[]]
        for message in messages[len(head) :]:
            exchanges[-1].append(message)
            if message["role"] == "assistant":
                exchanges.append([])
        parts: list[Tokens] = []
        held: list[Message] = []
        for exchange in exchanges[:-1]:
            (longer, alone) = self.conversations.encode([[*head, *held, *exchange], [*head, *exchange]])
            for bad in (longer, alone):
                if isinstance(bad, BadRecord):
                    return bad
            assert isinstance(longer, Tokens) and isinstance(alone, Tokens)
            if held and len(longer.ids) - 1 <= self._sequence_length:
                parts[-1], held = longer, [*held, *exchange]
                continue
            if len(alone.ids) - 1 > self._sequence_length:
                return BadRecord(
                    f"one question and its answer are {len(alone.ids) - 1} tokens, more than"
                    f" task.sequence_length={self._sequence_length}, and cannot be split"
                )
            parts.append(alone)
            held = exchange
        return parts

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """The parts of a conversation that had to be split, else itself."""
        if "starts" not in sample.fields:
            return [sample]
        bounds = [*sample.fields["starts"].tolist(), sample.length]
        return [
            _encoded(sample.fields["ids"][begin:end], sample.fields["labels"][begin:end])
            for begin, end in pairwise(bounds)
        ]

    @staticmethod
    def _inputs_and_labels(sample: Encoded) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return sample.fields["ids"], sample.fields["labels"]

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """UTF-8 bytes of the answers, as far as they were kept."""
        labels = sample.fields["labels"]
        return len(self._tokenizer.decode(labels[labels != IGNORE].tolist()).encode())

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded | BadRecord]:
        """Conversations to be continued: a text is what the user says, or a JSON list of messages."""
        tokens = self.conversations.encode_prompts([conversation_of(text) for text in texts])
        return [one if isinstance(one, BadRecord) else self._encode_prompt(one.ids) for one in tokens]


def conversation_of(text: str) -> list[Message] | BadRecord:
    """What a text on the command line stands for; see `Chat.encode_prompts`."""
    if text.lstrip().startswith("[{"):
        try:
            value = json.loads(text)
        except ValueError:
            return [{"role": "user", "content": text}]
        return as_messages(value, "the conversation")
    return as_messages([{"role": "user", "content": text}], "the text")


def _sample(parts: Sequence[Tokens]) -> Encoded:
    ids = np.concatenate([np.asarray(part.ids[:-1], np.int32) for part in parts])
    labels = np.concatenate([labels_of(part) for part in parts])
    sample = _encoded(ids, labels)
    if len(parts) == 1:
        return sample
    starts = np.cumsum([0, *(len(part.ids) - 1 for part in parts[:-1])]).astype(np.int64)
    return sample._replace(fields={**sample.fields, "starts": starts})


def labels_of(tokens: Tokens) -> npt.NDArray[np.int64]:
    """[length - 1] int64: the token after each but the last, IGNORE where it is not learned."""
    return np.where(tokens.learned[1:], np.asarray(tokens.ids[1:], np.int64), IGNORE)


def _encoded(ids: npt.NDArray[np.int32], labels: npt.NDArray[np.int64]) -> Encoded:
    return Encoded({"ids": ids, "labels": labels}, len(ids), int(np.count_nonzero(labels != IGNORE)))
