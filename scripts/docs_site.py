"""Pages of the site that are made of the code: every key of the configuration, and the contracts of the parts.

A hook of mkdocs (see mkdocs.yml). A key's default and explanation are those of the YAML file that a run composes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("model", "task", "data", "tokenizer", "optimizer", "schedule", "engine", "checkpoint", "logging", "debug")
CONTRACTS = (
    *("trainer.models", "trainer.models.base", "trainer.tasks", "trainer.data", "trainer.data.sources"),
    *("trainer.data.stages", "trainer.engine.base", "trainer.metrics", "trainer.schedule", "trainer.errors"),
)
_LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w]+):(?: +(?P<value>[^#]*?))?(?: *# *(?P<comment>.*))?$")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in (("reference/keys.md", keys_page()), ("reference/contracts.md", contracts_page())):
        files.append(File.generated(config, name, content=text))
    return files


def keys_page() -> str:
    """Every key of configs/, by file, with its value there and the comment behind it."""
    parts = [
        "# Every key",
        "The facts of a run, then the choices of each group. Set them as `key=value`, choose as `group=choice`.",
        "## Facts",
    ]
    parts += table(ROOT / "configs" / "train.yaml", "")
    for group in GROUPS:
        parts.append(f"## {group}")
        for path in sorted((ROOT / "configs" / group).glob("*.yaml")):
            parts += [f"### {group}={path.stem}", *introduction(path), *table(path, f"{group}.")]
    return "\n\n".join(parts) + "\n"


def contracts_page() -> str:
    """What a part of one's own has to keep to, from the docstrings."""
    return "# Contracts\n\n" + "\n\n".join(f"::: {module}" for module in CONTRACTS) + "\n"


def introduction(path: Path) -> list[str]:
    """The comment at the head of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    words = []
    for line in lines:
        if not line.startswith("#"):
            break
        if "@package" not in line:
            words.append(line.lstrip("# "))
    return [" ".join(words)] if words else []


def table(path: Path, prefix: str) -> list[str]:
    """The keys of a file as a table of Markdown; nothing for one that only chooses others."""
    rows = [f"| `{prefix}{key}` | `{value}` | {comment} |" for key, value, comment in keys_of(path)]
    return ["\n".join(["| key | value | |", "|---|---|---|", *rows])] if rows else []


def keys_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """(dotted key, value, comment) of a file's leaves; `hydra` and `defaults` are Hydra's own."""
    above: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        depth = len(found["indent"]) // 2
        above[depth:] = [found["key"]]
        if above[0] in ("defaults", "hydra"):
            continue
        if found["value"]:
            comment = (found["comment"] or "").replace("|", "\\|")
            yield ".".join(above), found["value"].replace("|", "\\|"), comment
