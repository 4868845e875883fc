"""Build the packaged corpus python_docs: the reStructuredText sources of the Python documentation, for language models.

    python scripts/data/python_docs.py [--folder DIR] [--out DIR]

Takes them from Debian's package python3.11-doc, or from `--folder` (a `Doc/` tree of CPython, or any `_sources`).
Standard library only. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from corpora import CORPORA, SPLITS, normalise, split_name, write_checksums, write_jsonl_gz
from debian import Apt, NoApt

PACKAGE = "python3.11-doc"
SOURCES = "usr/share/doc/python3.11/html/_sources"
LEFT_OUT = ("license", "copyright", "includes/")  # legal texts, and fragments that other files include
VALIDATION, TEST = 0.04, 0.06  # shares of the files
MAX_CHARACTERS = 1000  # of a record; a few hundred tokens


def passages(text: str) -> Iterator[str]:
    """`text` cut at empty lines into passages of at most MAX_CHARACTERS; a longer paragraph is cut at line ends."""
    passage = ""
    for paragraph in text.strip("\n").split("\n\n"):
        if (
            passage and len(passage) + len(paragraph) + 2 > MAX_CHARACTERS
        ):  # true before every paragraph too long itself
            yield passage
            passage = ""
        if len(paragraph) <= MAX_CHARACTERS:
            passage += ("\n\n" if passage else "") + paragraph
            continue
        for line in paragraph.splitlines():
            if passage and len(passage) + len(line) + 1 > MAX_CHARACTERS:
                yield passage
                passage = ""
            passage += ("\n" if passage else "") + line[:MAX_CHARACTERS]
    if passage.strip():
        yield passage


def read_passages(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The passages of every file, the files dealt whole to the splits; no held-out passage occurs in train."""
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    for path in sorted([*folder.rglob("*.rst"), *folder.rglob("*.rst.txt")]):
        source = path.relative_to(folder).as_posix().removesuffix(".txt").removesuffix(".rst")
        if source.startswith(LEFT_OUT):
            continue
        rows = [{"text": text, "source": source} for text in passages(path.read_text(encoding="utf-8"))]
        splits[split_name(source, VALIDATION, TEST)] += rows
    seen: set[str] = set()
    for name in ("test", "validation", "train"):
        splits[name] = [row for row in splits[name] if normalise(row["text"]) not in seen]
        seen.update(normalise(row["text"]) for row in splits[name])
    return splits


def main() -> None:
    """Parse the command line, build, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help=f"a folder of .rst files (default: from the package {PACKAGE})")
    parser.add_argument("--out", type=Path, default=CORPORA / "python_docs", help="folder of the three files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        folder = options.folder
        if folder is None:
            try:
                apt = Apt(Path(temporary, "apt"))
                folder = apt.unpack(PACKAGE, Path(temporary)) / SOURCES
            except NoApt as error:
                sys.exit(f"{error}\nor give --folder, the Doc/ folder of a CPython checkout.")
            print(f"{PACKAGE} {apt.version(PACKAGE)}")
        splits = read_passages(folder)
        options.out.mkdir(parents=True, exist_ok=True)
        licence = next(iter(sorted(folder.glob("license.rst*"))), None)
        if licence:
            shutil.copyfile(licence, options.out / "LICENSE")
    for name in SPLITS:
        write_jsonl_gz(options.out / f"{name}.jsonl.gz", splits[name])
        files = len({row["source"] for row in splits[name]})
        size = sum(len(row["text"].encode()) for row in splits[name])
        print(f"{name:10}  {files:4} files  {len(splits[name]):6,} passages  {size:10,} bytes of text")
    write_checksums(options.out)


if __name__ == "__main__":
    main()
