"""Conversations as token ids: a chat template writes them, and tells which tokens the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from trainer.data.sources import column
from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Record
from trainer.tasks.chat_template import ChatTemplate, Message, TemplateFault, template_text
from trainer.tasks.text import TextTokenizer

ROLES = ("system", "user", "assistant", "tool")

_GUARD = "\ufdd0"
"""A noncharacter of Unicode. In a message's special tokens it parts the first character from the rest, so that a
message cannot spell one; it goes before anything is encoded."""


class ChatTokenizer(TextTokenizer, Protocol):
    """What conversations need of a tokenizer besides."""

    special_tokens: Mapping[str, int]

    def token_of(self, id_: int) -> str: ...


class Tokens(NamedTuple):
    """ids: of a conversation; learned: for each whether the assistant wrote it."""

    ids: list[int]
    learned: list[bool]


Piece = tuple[str | int, bool]
"""A text to encode or the id of a special token, and whether the assistant wrote it."""


class Conversations:
    """Encodes conversations by a chat template.

    What the assistant wrote is known by rendering, not by searching: an answer is what the template adds to the
    conversation before it, written up to the point where an answer is asked for. Prompt and answers are encoded apart,
    as they are when the model is used, and within either special tokens stand only where the template put them. An
    answer ends with the special token that the template puts behind it; what follows that is not learned.
    """

    def __init__(self, tokenizer: ChatTokenizer, chat_template: str | None, system: str | None) -> None:
        """chat_template: see `template_text`; system: the message put before conversations that have none.

        Raises ConfigError for a template that is none, that cannot write a question and its answer, that rewrites what
        it wrote before, or that ends an answer without a special token.
        """
        self._tokenizer = tokenizer
        self._system = system
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        self.template_text = template_text(chat_template)
        named = chat_template is not None and "{" not in chat_template
        told = f"task.chat_template={chat_template}, " if named else "task.chat_template, "
        try:
            self._template = ChatTemplate(
                self.template_text, {name: tokenizer.token_of(id_) for name, id_ in roles.items()}
            )
            probe = self._pieces([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except TemplateFault as error:
            raise ConfigError(f"{told}{error}; mend the template.") from error
        answer = [piece for piece, learned in probe if learned]
        ends = [piece for piece in answer[1:] if isinstance(piece, int)]
        if not ends:
            raise ConfigError(
                f"{told.rstrip(', ')} ends an answer with none of the tokenizer's special tokens"
                f" ({', '.join(tokenizer.special_tokens)}), so the model would not learn to stop;"
                " write eos_token after each message."
            )
        self.end_id = ends[0]

    def encode(
        self, conversations: Sequence[Sequence[Message] | BadRecord], last_answer_only: bool = False
    ) -> list[Tokens | BadRecord]:
        """The conversations up to their last answers. last_answer_only: as if the others were not the assistant's."""
        plans: list[list[Piece] | BadRecord] = []
        for one in conversations:
            try:
                plans.append(one if isinstance(one, BadRecord) else self._pieces(one, last_answer_only))
            except TemplateFault as error:
                plans.append(BadRecord(f"the chat template cannot write it: {error}"))
        return self._encode_plans(plans)

    def encode_prompts(self, conversations: Sequence[Sequence[Message] | BadRecord]) -> list[Tokens | BadRecord]:
        """The conversations, ready for an answer to follow; nothing is learned."""
        plans: list[list[Piece] | BadRecord] = []
        for one in conversations:
            try:
                plans.append(one if isinstance(one, BadRecord) else self._split(self._render(one, True), False))
            except TemplateFault as error:
                plans.append(BadRecord(f"the chat template cannot write it: {error}"))
        return self._encode_plans(plans)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        return self._template.render([self._guarded(one) for one in messages], add_generation_prompt)

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._guarded(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._guarded(one) for one in value]
        return self._special.sub(lambda m: m[0][0] + _GUARD + m[0][1:], value) if isinstance(value, str) else value

    def _pieces(self, messages: Sequence[Message], last_answer_only: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        done = ""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        for place in answers[-1:] if last_answer_only else answers:
            before, after = self._render(messages[:place], True), self._render(messages[: place + 1], False)
            if not (before.startswith(done) and after.startswith(before)):
                raise TemplateFault(
                    f"what it writes of {place + 1} messages does not begin with what it writes of those before,"
                    " so that the assistant's words cannot be told from the rest"
                )
            pieces += self._split(before[len(done) :], False) + self._split(after[len(before) :], True)
            done = after
        return pieces

    def _split(self, text: str, learned: bool) -> list[Piece]:
        """`text` cut at its special tokens."""
        pieces: list[Piece] = []
        end = 0
        for found in self._special.finditer(text):
            pieces += [(text[end : found.start()], learned), (self._tokenizer.special_tokens[found[0]], learned)]
            end = found.end()
        pieces.append((text[end:], learned))
        plain = ((piece.replace(_GUARD, "") if isinstance(piece, str) else piece, kept) for piece, kept in pieces)
        return [(piece, kept) for piece, kept in plain if piece != ""]

    def _encode_plans(self, plans: Sequence[list[Piece] | BadRecord]) -> list[Tokens | BadRecord]:
        texts = [
            piece for plan in plans if not isinstance(plan, BadRecord) for piece, _ in plan if isinstance(piece, str)
        ]
        ids = iter(self._tokenizer.encode_batch(texts))
        return [plan if isinstance(plan, BadRecord) else self._join(plan, ids) for plan in plans]

    def _join(self, plan: Sequence[Piece], encoded: Iterator[list[int]]) -> Tokens:
        tokens = Tokens([], [])
        ended = False
        for piece, learned in plan:
            ended = ended and learned
            ids = [piece] if isinstance(piece, int) else next(encoded)
            tokens.ids.extend(ids)
            tokens.learned.extend([learned and not ended] * len(ids))
            ended = ended or (learned and piece == self.end_id)
        return tokens


def messages_at(record: Record, path: str) -> list[Message] | BadRecord:
    """The conversation in the (dotted) column `path`, or why there is none."""
    try:
        value = column(record, path)
    except KeyError:
        return BadRecord(f"column '{path}' is missing")
    return as_messages(value, f"column '{path}'")


def as_messages(value: Any, where: str) -> list[Message] | BadRecord:
    """`value` as messages, each a mapping with a role and a content, or of the assistant with `tool_calls`; `where`:
    what to call it if it is none."""
    if not isinstance(value, list):
        return BadRecord(f"{where} holds {type(value).__name__}, not a list of messages")
    if not value:
        return BadRecord(f"{where} holds no message")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            return BadRecord(f"{where}: message {number} is {type(message).__name__}, not a role and a content")
        role, content = message.get("role"), message.get("content")
        if role is None:
            return BadRecord(f"{where}: message {number} has no role")
        if role not in ROLES:
            return BadRecord(f"{where}: message {number} has the role {role!r}, which is none of {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls and role == "assistant":
            if not all(isinstance(one, Mapping) and _is_call(one.get("function")) for one in calls):
                return BadRecord(f"{where}: message {number} has a tool call without a function's name and arguments")
            messages.append({"role": role, "content": content or "", "tool_calls": [*calls]})
            continue
        if not isinstance(content, str) or not content.strip():
            return BadRecord(f"{where}: message {number} ({role}) has no text as its content")
        messages.append({"role": role, "content": content})
    return messages


def _is_call(function: Any) -> bool:
    return (
        isinstance(function, Mapping)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | Mapping)
    )
