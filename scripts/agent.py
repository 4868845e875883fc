"""An agent on a model of ours: it asks for tools, is told what they say, and answers.

    python -m trainer.export run=NAME to=out                       # a run of task=chat
    transformers serve out --port 8000                             # or: vllm serve out
    python scripts/agent.py "What is the version of vim?" [--url http://localhost:8000/v1] [--model out]

The tool here is `package(name)`, what dpkg knows of an installed package. Any server with OpenAI's interface will do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from openai import OpenAI

MAX_TURNS = 8
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "package",
            "description": "What is known of an installed package of Debian.",
            "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        },
    }
]


def package(name: str) -> str:
    """Version and section of an installed package, or that there is none."""
    form = "${Version} ${Section}"
    found = subprocess.run(["dpkg-query", "-W", f"-f={form}", "--", name], capture_output=True, text=True, check=False)
    return found.stdout.strip() or f"{name} is not installed"


def converse(
    client: OpenAI,
    model: str,
    question: str,
    functions: Mapping[str, Callable[..., str]],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All messages until the model answers without asking for a tool; `say` gets the text as it comes."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        text, calls = "", []
        stream = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, stream=True, temperature=0.0, max_tokens=200
        )
        for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    text += choice.delta.content
                    say(choice.delta.content)
                calls += choice.delta.tool_calls or []
        answer: dict[str, Any] = {"role": "assistant", "content": text}
        messages.append(answer)
        if not calls:
            return messages
        answer["tool_calls"] = [
            {"id": call.id, "type": "function", "function": call.function.model_dump(include={"name", "arguments"})}
            for call in calls
        ]
        for call in calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": _ask(functions, call.function)})
    return messages


def _ask(functions: Mapping[str, Callable[..., str]], wanted: Any) -> str:
    """What a tool says; what is wrong with a call is told to the model, which may try again."""
    try:
        return functions[wanted.name](**json.loads(wanted.arguments))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {type(error).__name__}: {error}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="out")
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key="none")

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    converse(client, options.model, options.question, {"package": package}, say)
    say("\n")


if __name__ == "__main__":
    main()
