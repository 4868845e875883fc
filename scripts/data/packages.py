"""Conversations and preferences about Debian's packages: what `chat_small` and `dpo_small` train on.

    python scripts/data/packages.py [--out data/packages]

OUT/chat gets {train,validation,test}.jsonl.gz with `messages`: questions made from templates, answered by the package's
own synopsis, section and homepage. OUT/preferences gets `prompt`, `chosen` (the synopsis), `rejected`, and `kind`, how
it came about: "other", the synopsis of another package of the same section, or "cut", the first half of the right one.
The facts are real, the questions are templates, so a model learns to answer these and no others. All binary packages of
a source package are in one split. OUT/manifest.json has the counts. Needs apt; standard library only. Descriptions are
under the licences of their packages and are not committed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpora import SPLITS, normalise, split_name, squeeze, unit_hash, write_jsonl_gz
from debian import Apt, NoApt
from sources import stanzas

ROOT = Path(__file__).resolve().parents[2]
VALIDATION, TEST = 0.02, 0.03  # shares of the source packages
JUDGED = 0.1  # share of the packages of train with a preference: they cost people more than answers
QUESTIONS = {
    "synopsis": ("What does the package {name} do?", "What is {name}?", "Describe the package {name} in a few words."),
    "section": ("Which section is it in?", "Where in Debian does it belong?"),
    "homepage": ("Where can I read more about it?", "Does it have a homepage?"),
}


@dataclass(frozen=True)
class Package:
    """What Debian says of a binary package; `source`: what it is built from."""

    name: str
    source: str
    synopsis: str
    section: str
    homepage: str


def read_packages(apt: Apt) -> list[Package]:
    """The packages of the distribution that have a synopsis, each synopsis once."""
    found: dict[str, Package] = {}
    seen: set[str] = set()
    synopses = {
        fields["Description-md5"]: squeeze(fields["Description-en"].split("\n")[0])
        for _, text in apt.lists("*_i18n_Translation-en*")
        for fields in stanzas(text)
        if "Description-en" in fields
    }
    for _, text in apt.lists("*_Packages*"):
        for fields in stanzas(text):
            name, synopsis = fields.get("Package", ""), synopses.get(fields.get("Description-md5", ""), "")
            if not name or name in found or len(synopsis.split()) < 2 or normalise(synopsis) in seen:
                continue
            seen.add(normalise(synopsis))
            source = fields.get("Source", name).split()[0]
            found[name] = Package(name, source, synopsis, fields.get("Section", ""), fields.get("Homepage", ""))
    return sorted(found.values(), key=lambda package: package.name)


def ask(kind: str, name: str) -> str:
    """One of the wordings of a question, the same one for the same package."""
    wordings = QUESTIONS[kind]
    return wordings[int(unit_hash(f"{kind} {name}") * len(wordings))].format(name=name)


def conversation(package: Package) -> dict[str, object]:
    """One, two or three questions about a package, and their answers."""
    answers = {"synopsis": package.synopsis, "section": package.section, "homepage": package.homepage}
    kinds = ["synopsis", *(kind for kind in ("section", "homepage") if unit_hash(f"{kind}? {package.name}") < 0.4)]
    messages = []
    for kind in kinds:
        if answers[kind]:
            messages.append({"role": "user", "content": ask(kind, package.name)})
            messages.append({"role": "assistant", "content": answers[kind]})
    return {"messages": messages}


def preference(package: Package, neighbours: Sequence[Package]) -> dict[str, str]:
    """A question with the right synopsis and a wrong one. neighbours: packages of the same section and split."""
    place = unit_hash(f"neighbour {package.name}")
    other = neighbours[int(place * len(neighbours))]
    words = package.synopsis.split()
    cut = " ".join(words[: max(1, len(words) // 2)])
    kind = "cut" if other is package or unit_hash(f"kind {package.name}") < 0.5 else "other"
    rejected = cut if kind == "cut" else other.synopsis
    return {"prompt": ask("synopsis", package.name), "chosen": package.synopsis, "rejected": rejected, "kind": kind}


def preferences(packages: Sequence[Package]) -> Iterator[Mapping[str, str]]:
    """A preference for each package."""
    sections: dict[str, list[Package]] = defaultdict(list)
    for package in packages:
        sections[package.section].append(package)
    yield from (preference(package, sections[package.section]) for package in packages)


def main() -> None:
    """Parse the command line, fetch, split, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "packages")
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        try:
            packages = read_packages(Apt(Path(temporary)))
        except NoApt as error:
            sys.exit(str(error))
    splits: dict[str, list[Package]] = {name: [] for name in SPLITS}
    for package in packages:
        splits[split_name(package.source, VALIDATION, TEST)].append(package)
    for name, members in splits.items():
        write_jsonl_gz(out / "chat" / f"{name}.jsonl.gz", map(conversation, members))
        judged = [one for one in members if name != "train" or unit_hash(f"judged {one.name}") < JUDGED]
        write_jsonl_gz(out / "preferences" / f"{name}.jsonl.gz", preferences(judged))
    counts = {name: len(members) for name, members in splits.items()}
    (out / "manifest.json").write_text(json.dumps({"packages": counts}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(counts), f"in {out}")


if __name__ == "__main__":
    main()
