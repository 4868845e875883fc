"""Chat templates: Jinja texts, as transformers has them, that write a conversation as one text.

A template is somebody's program: it runs in Jinja's sandbox, and what goes wrong in it is told with its line.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.errors import ConfigError

DEFAULT = """\
{{- bos_token -}}
{% for message in messages -%}
{{- '[' + message['role'] + ']\\n' -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set arguments = call['function']['arguments'] -%}
{{- '<tool_call>{"name": ' + call['function']['name'] | tojson + ', "arguments": ' -}}
{{- (arguments if arguments is string else arguments | tojson) + '}</tool_call>' -}}
{%- endfor -%}
{{- (message['content'] or '') | trim + eos_token -}}
{% endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\\n' -}}{% endif %}"""
"""The template of a run that names none. A turn ends with the end token, which no message can contain; what the
assistant wants of a tool is JSON between marks."""

Message = Mapping[str, Any]
"""`role` and `content`; of an assistant that calls tools `tool_calls` as OpenAI's interface has them."""


def response_template(template: str, eos_token: str) -> dict[str, Any] | None:
    """How a server of transformers takes an answer apart (its `response_template`): text and calls of tools. None for
    another template than `DEFAULT`, whose marks are not known here."""
    if template != DEFAULT:
        return None
    call = {"type": "function", "function": "{content}"}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "[assistant]\n",
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": call,
            },
            "content": {"close_pattern": r"\s*" + re.escape(eos_token), "content": "text"},
        },
    }


class TemplateFault(Exception):
    """A conversation that a template cannot write; says in which line, and why."""


class ChatTemplate:
    """A compiled template, which is given `messages`, `add_generation_prompt` and `special_tokens` by name."""

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: `bos_token`, `eos_token` and the like. Raises TemplateFault where `text` is no template."""
        self.text = text
        self._special_tokens = dict(special_tokens)
        _ = self._compiled  # tells mistakes now

    @cached_property
    def _compiled(self) -> jinja2.Template:
        extensions = [LoopControlExtension, _Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise_exception
        try:
            return environment.from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFault(f"line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of `messages`; add_generation_prompt: with what comes before an answer. Raises TemplateFault."""
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render(**given, **self._special_tokens)
        except Exception as error:  # a template's expressions can raise anything
            frames = traceback.extract_tb(error.__traceback__)  # which Jinja makes to show lines of the template
            lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
            raise TemplateFault(f"line {lines[-1] if lines else '?'}: {error}") from error

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str]]]:
        """To another process: compiled templates do not travel."""
        return ChatTemplate, (self.text, self._special_tokens)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark the assistant's words: here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012  (declared so by the base)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_text(given: str | None) -> str:
    """The template that `task.chat_template` means: None = `DEFAULT`; a text with braces; else a file.

    A file is the template itself (chat_template.jinja) or a JSON with the key `chat_template` (tokenizer_config.json).
    Raises ConfigError.
    """
    if given is None or "{" in given:
        return given or DEFAULT
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"task.chat_template={given} cannot be read: {error}; give a file, or the text of a template."
        ) from error
    if path.suffix != ".json":
        return text
    try:
        content: Any = json.loads(text)
        return str(content["chat_template"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"task.chat_template={given} has no key chat_template; give a file that has.") from error
