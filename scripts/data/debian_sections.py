"""Fetch Debian's package descriptions with their sections: what `experiment=text_classification` trains on.

    python scripts/data/debian_sections.py [--out data/debian_sections]

Writes {train,validation,test}.jsonl.gz (keys "text", "section", "package") and manifest.json (counts, and how many of
the test split the most frequent section gets right). The descriptions carry the licences of their packages: they are
fetched where a model is trained, never committed. Standard library only; nothing is installed; Debian or Ubuntu.

Packages that are built from one source describe themselves in nearly the same words, and so do its versions. So all
that come from a source whose name is the same but for numbers go to one split, and no text of a held-out split occurs
in another.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from corpora import SPLITS, normalise, split_name, squeeze, write_jsonl_gz
from debian import Apt, NoApt
from sources import paragraphs, stanzas

ROOT = Path(__file__).resolve().parents[2]
VALIDATION, TEST = 0.04, 0.08  # shares of the families of sources

Row = dict[str, str]


def family(fields: dict[str, str]) -> str:
    """What packages that describe themselves alike have in common: the name of their source without its numbers."""
    source = fields.get("Source", fields["Package"]).split(" ")[0]
    return re.sub(r"[\d.]+", "0", source)


def read_rows(packages: str, descriptions: dict[str, str]) -> Iterator[tuple[str, Row]]:
    """(family, row) of every package of a list that is described, in the order of the list."""
    for fields in stanzas(packages):
        description = descriptions.get(fields.get("Description-md5", ""))
        if description and "Section" in fields:
            section = fields["Section"].rpartition("/")[2]
            text = "\n".join(squeeze(paragraph) for paragraph in paragraphs(description))
            yield family(fields), {"text": text, "section": section, "package": fields["Package"]}


def deal(rows: Iterator[tuple[str, Row]]) -> dict[str, list[Row]]:
    """The rows of each split, each text once, held-out splits first."""
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for key, row in rows:
        splits[split_name(key, VALIDATION, TEST)].append(row)
    seen: set[str] = set()
    for name in ("test", "validation", "train"):
        unique = {normalise(row["text"]): row for row in reversed(splits[name])}
        splits[name] = [row for text, row in reversed(unique.items()) if text not in seen]
        seen.update(unique)
    return splits


def fetch(folder: Path) -> Iterator[tuple[str, Row]]:
    """The rows of all package lists that this machine's apt names; raises NoApt."""
    apt = Apt(folder)
    descriptions = {
        fields["Description-md5"]: fields["Description-en"]
        for _, text in apt.lists("*_i18n_Translation-en*")
        for fields in stanzas(text)
        if "Description-en" in fields
    }
    for _, packages in apt.lists("*_Packages*"):
        yield from read_rows(packages, descriptions)


def main() -> None:
    """Parse the command line, fetch, split, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "debian_sections", help="default: %(default)s")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        try:
            splits = deal(fetch(Path(temporary)))
        except NoApt as error:
            sys.exit(str(error))
    counts = Counter(row["section"] for rows in splits.values() for row in rows)
    most_frequent = Counter(row["section"] for row in splits["train"]).most_common(1)[0][0]
    manifest = {
        "records": {name: len(splits[name]) for name in SPLITS},
        "sections": dict(sorted(counts.items())),
        "most_frequent": most_frequent,
        "its_share_of_test": sum(row["section"] == most_frequent for row in splits["test"]) / len(splits["test"]),
    }
    for name in SPLITS:
        write_jsonl_gz(out / f"{name}.jsonl.gz", splits[name])
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(manifest["records"]), f"{len(counts)} sections in {out}")


if __name__ == "__main__":
    main()
