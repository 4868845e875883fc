"""Parallel sentences from translated documents: read both as blocks of text, align the blocks by structure.

`read_html` serves LibreOffice's and GIMP's help, `read_man` manual pages. Standard library only.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from html.parser import HTMLParser
from pathlib import Path

from corpora import squeeze

TRUSTED_RUN = 4  # blocks of equal kinds in a row that vouch for each other; fewer may be chance
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\w\.\w\.)(?<!\b[Bb]zw\.)(?<!etc\.)\s+(?=[A-ZÄÖÜÉÈÀ„»\"'(])")


@dataclass(frozen=True)
class Block:
    """A paragraph, heading or item. `kind` is what a translation shares with its source; `named` if it is an id."""

    kind: str
    text: str
    named: bool = False


def align(source: list[Block], target: list[Block]) -> Iterator[tuple[str, str]]:
    """The texts of blocks that stand in the same place: all when the kinds agree, else those in agreeing runs."""
    source_kinds, target_kinds = ([block.kind for block in blocks] for blocks in (source, target))
    if source_kinds == target_kinds:
        yield from ((a.text, b.text) for a, b in zip(source, target, strict=True))
        return
    for run in SequenceMatcher(None, source_kinds, target_kinds, autojunk=False).get_matching_blocks():
        for a, b in zip(source[run.a : run.a + run.size], target[run.b : run.b + run.size], strict=True):
            if a.named or run.size >= TRUSTED_RUN:
                yield a.text, b.text


def sentences(source: str, target: str) -> list[tuple[str, str]]:
    """A pair of paragraphs, sentence by sentence if both have the same number of them, else whole."""
    parts = SENTENCE_END.split(source), SENTENCE_END.split(target)
    if len(parts[0]) != len(parts[1]):
        return [(source, target)]
    return list(zip(*parts, strict=True))


class HtmlBlocks(HTMLParser):
    """Collects the text between block tags. A block whose id matches `names` has that id as its kind, else its tag."""

    BLOCKS = re.compile(r"p|h[1-6]|t[dhr]|table|caption|li|[uod]l|d[td]|title|div|blockquote|body|section|figure")
    SKIPPED = frozenset(("script", "style", "pre", "head", "code"))

    def __init__(self, names: str) -> None:
        super().__init__(convert_charrefs=True)
        self.names = re.compile(names)
        self.blocks: list[Block] = []
        self._open: list[tuple[str, str]] = []  # (tag, id) of the block tags around
        self._words: list[str] = []
        self._skipping = ""
        self._depth = 0

    def _end_block(self) -> None:
        text = squeeze("".join(self._words))
        self._words.clear()
        if text and self._open:
            tag, name = self._open[-1]
            self.blocks.append(Block(name or tag, text, named=bool(name)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipping:
            self._depth += tag == self._skipping
        elif tag in self.SKIPPED and not (tag == "code" and self._words):  # code within a sentence belongs to it
            self._skipping, self._depth = tag, 1
        elif self.BLOCKS.fullmatch(tag):
            self._end_block()
            name = dict(attrs).get("id") or ""
            self._open.append((tag, name if self.names.match(name) else ""))
        elif tag == "br":
            self._words.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            self._depth -= tag == self._skipping
            self._skipping = self._skipping if self._depth else ""
        elif self.BLOCKS.fullmatch(tag):
            self._end_block()
            while self._open and self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._words.append(data)


def read_html(path: Path, names: str = r"(par|hd)_id") -> list[Block]:
    """The blocks of an HTML page; ids matching `names` are the same in every language."""
    parser = HtmlBlocks(names)
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    return parser.blocks


FONT_WORDS = frozenset(("B", "I", "R", "SM", "SB", "BR", "RB", "BI", "IB", "IR", "RI"))
VERBATIM = {"nf": "fi", "EX": "EE", "TS": "TE"}
TROFF = (
    (r"\\f(\[\w*\]|\(..|.)", ""),
    (r"\\s[-+]?\d", ""),
    (r"\\\((aq|cq|oq)", "'"),
    (r"\\\((dq|lq|rq)", '"'),
    (r"\\\(em", "\u2014"),
    (r"\\\(en", "\u2013"),
    (r"\\\(bu", "\u2022"),
    (r"\\-", "-"),
    (r"\\[ ~]", " "),
    (r"\\e|\\\(rs", r"\\"),
    (r"\\[&,/:|^%c]|\\\*?\[[^\]]*\]|\\\*?\(..", ""),
)


def plain_troff(text: str) -> str:
    """`text` without troff's escapes for fonts, sizes and special characters."""
    for pattern, replacement in TROFF:
        text = re.sub(pattern, replacement, text)
    return text


def macro_words(rest: str) -> list[str]:
    """The arguments of a troff macro, quotes honoured."""
    return [quoted or bare for quoted, bare in re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)]


def read_man(path: Path) -> list[Block]:
    """The blocks of a gzipped manual page (man macros); kinds are the macros that begin them."""
    blocks: list[Block] = []
    words: list[str] = []
    kind, verbatim_end = "", ""

    def end_block(next_kind: str) -> None:
        nonlocal kind
        text = squeeze(plain_troff(" ".join(words)))
        words.clear()
        if text:
            blocks.append(Block(kind, text))
        kind = next_kind

    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            macro = re.match(r"[.']\s*(\w+)\s*(.*)", line)
            if verbatim_end:
                verbatim_end = "" if macro and macro[1] == verbatim_end else verbatim_end
            elif macro and macro[1] in FONT_WORDS:
                glue = "" if len(macro[1]) == 2 and macro[1] not in ("SM", "SB") else " "
                words.append(glue.join(macro_words(macro[2])))
                if kind == "TP":
                    end_block("TP text")
            elif macro:
                end_block(macro[1])
                verbatim_end = VERBATIM.get(macro[1], "")
                if macro[1] in ("SH", "SS"):
                    words += macro_words(macro[2])
                    end_block("text")
            elif not line.strip():
                end_block("PP")
            elif not line.startswith((".", "'")):
                words.append(line)
                if kind == "TP":
                    end_block("TP text")
    end_block("")
    return blocks


def read_trees(
    source: Path, target: Path, pattern: str, read: Callable[[Path], list[Block]]
) -> Iterator[tuple[str, str]]:
    """Sentence pairs of all files of the same relative path under two folders."""
    for path in sorted(source.rglob(pattern)):
        twin = target / path.relative_to(source)
        if twin.is_file():
            for pair in align(read(path), read(twin)):
                yield from sentences(*pair)
