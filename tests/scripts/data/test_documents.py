"""Reading and aligning translated documents (scripts/data/documents.py)."""

import gzip
from pathlib import Path

from documents import Block, align, read_html, read_man, read_trees, sentences

PAGE = """<html><head><title>Ignored</title></head><body>
<h1 id="hd_id1">{title}</h1>
<p id="par_id2">Press <span class="key">Ctrl</span> and <code>x</code>.<br>Done</p>
<pre>not text</pre><script>alert(1)</script>
<ul><li>{item}</li></ul></body></html>"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def test_html_blocks_carry_shared_ids(tmp_path: Path) -> None:
    blocks = read_html(write(tmp_path / "page.html", PAGE.format(title="The title", item="First item")))
    assert blocks == [
        Block("hd_id1", "The title", named=True),
        Block("par_id2", "Press Ctrl and x. Done", named=True),
        Block("li", "First item"),
    ]


def test_man_blocks_are_plain_text(tmp_path: Path) -> None:
    page = r""".\" a comment
.TH LS 1
.SH NAME
ls \- list
.SH DESCRIPTION
Lists \fBfiles\fP in
.BR name (1).
.PP
Another one.
.TP
\fB\-a\fP
do not hide
.nf
verbatim text
.fi
"""
    blocks = read_man(write(tmp_path / "ls.1.gz", page))
    texts = [block.text for block in blocks]
    assert texts == [
        *("NAME", "ls - list", "DESCRIPTION", "Lists files in name(1)."),
        *("Another one.", "-a", "do not hide"),
    ]


def test_equal_structures_align_whole() -> None:
    english = [Block("h1", "One"), Block("p", "Two")]
    assert list(align(english, [Block("h1", "Eins"), Block("p", "Zwei")])) == [("One", "Eins"), ("Two", "Zwei")]


def test_only_long_runs_and_names_are_trusted_in_unequal_structures() -> None:
    english = [Block("p", f"e{n}") for n in range(5)] + [Block("li", "odd"), Block("h1", "lone")]
    german = [Block("p", f"d{n}") for n in range(5)] + [Block("h1", "allein")]
    assert list(align(english, german)) == [(f"e{n}", f"d{n}") for n in range(5)]
    named = [Block("par_id9", "lone", named=True)], [Block("p", "neu"), Block("par_id9", "allein", named=True)]
    assert list(align(*named)) == [("lone", "allein")]


def test_paragraphs_are_cut_where_both_have_the_sentences() -> None:
    assert sentences("One. Two!", "Eins. Zwei!") == [("One.", "Eins."), ("Two!", "Zwei!")]
    assert sentences("One. Two!", "Eins und zwei!") == [("One. Two!", "Eins und zwei!")]
    assert sentences("Use e.g. Paris here.", "Nimm z.B. Paris hier.") == [
        ("Use e.g. Paris here.", "Nimm z.B. Paris hier.")
    ]


def test_trees_pair_files_of_the_same_name(tmp_path: Path) -> None:
    write(tmp_path / "en" / "sub" / "a.html", PAGE.format(title="Title", item="Item"))
    write(tmp_path / "de" / "sub" / "a.html", PAGE.format(title="Titel", item="Punkt"))
    write(tmp_path / "en" / "alone.html", PAGE.format(title="Alone", item="Item"))
    pairs = list(read_trees(tmp_path / "en", tmp_path / "de", "*.html", read_html))
    assert ("Title", "Titel") in pairs and ("Item", "Punkt") in pairs
    assert not any("Alone" in source for source, _ in pairs)
