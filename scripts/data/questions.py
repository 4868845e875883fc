"""Build questions about Debian packages with the control stanza that answers them: for `experiment=question_answering`.

    python scripts/data/questions.py [--out data/questions]

Writes {train,validation,test}.jsonl.gz (keys "question", "context", "answer", "kind") and manifest.json (counts, and
what answering always the same would score). The contexts are real stanzas of the package lists; the questions are made
from templates, one for each package, and every answer stands in its context word for word. So this is an extractive
set made by templates: it tests reading and copying, not understanding. Needs apt, so Debian or Ubuntu; of Python the
standard library only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from corpora import SPLITS, Pair, split_name, unit_hash, write_jsonl_gz
from debian import Apt, NoApt
from sources import family, read_packages

ROOT = Path(__file__).resolve().parents[2]
VALIDATION, TEST = 0.02, 0.04  # shares of the families
MAX_CHARACTERS = 400  # of a context

KINDS = {
    "architecture": ("Architecture", ("For which architecture is {} built?", "What is the architecture of {}?")),
    "description": ("Description", ("What is {}?", "How is the package {} described?")),
    "homepage": ("Homepage", ("Where is the homepage of {}?", "What is the web address of {}?")),
    "maintainer": ("Maintainer", ("Who maintains {}?", "Who is the maintainer of the package {}?")),
    "section": ("Section", ("Which section is {} in?", "What is the section of the package {}?")),
    "size": ("Installed-Size", ("How many kilobytes does {} take?", "How large is {} once it is installed?")),
    "version": ("Version", ("Which version does {} have?", "What is the version of the package {}?")),
}
"""Kind of question: the field that answers it, and how it is asked."""

CONTEXT = ("Package", "Source", *(field for field, _ in KINDS.values()), "Multi-Arch", "Priority")


def answer_of(fields: Mapping[str, str], kind: str) -> str:
    """What is asked for; of a maintainer the name alone."""
    return fields[KINDS[kind][0]].partition(" <")[0].strip('"')


def ask(fields: Mapping[str, str]) -> dict[str, str] | None:
    """One question about a package, the same at every call; None where nothing short can be asked."""
    context = "\n".join(f"{name}: {value}" for name, value in fields.items() if name in CONTEXT)
    kinds = sorted(kind for kind, (field, _) in KINDS.items() if fields.get(field))
    if not kinds or len(context) > MAX_CHARACTERS:
        return None
    name = fields["Package"]
    kind = kinds[int(unit_hash(f"kind {name}") * len(kinds))]
    forms = KINDS[kind][1]
    question = forms[int(unit_hash(f"form {name}") * len(forms))].format(name)
    return {"question": question, "context": context, "answer": answer_of(fields, kind), "kind": kind}


def read_questions(packages: Mapping[str, Mapping[str, str]]) -> dict[str, list[Pair]]:
    """The questions by split; packages of one family are in the same."""
    splits: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for fields in packages.values():
        asked = ask(fields)
        if asked is not None:
            splits[split_name(family(fields), VALIDATION, TEST)].append(asked)
    return splits


def most_frequent(train: Sequence[Pair], held_out: Sequence[Pair]) -> dict[str, float]:
    """Exact match on `held_out` of the most frequent answer of `train`: to all questions, and to each kind of them."""

    def rate(group: str) -> float:
        answers: dict[str, Counter[str]] = {}
        for one in train:
            answers.setdefault(one[group] if group else "", Counter())[one["answer"]] += 1
        best = {key: counter.most_common(1)[0][0] for key, counter in answers.items()}
        hits = sum(best.get(one[group] if group else "") == one["answer"] for one in held_out)
        return hits / max(1, len(held_out))

    return {"one for all": rate(""), "one for each kind": rate("kind")}


def main() -> None:
    """Parse the command line, fetch, ask, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "questions", help="default: data/questions")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        try:
            splits = read_questions(read_packages(Apt(Path(temporary, "apt"))))
        except NoApt as error:
            sys.exit(str(error))
    manifest = {
        "licence": "package metadata of Debian",
        "questions": {name: len(splits[name]) for name in SPLITS},
        "kinds": Counter(one["kind"] for one in splits["train"]),
        "most_frequent_answer": {name: most_frequent(splits["train"], splits[name]) for name in SPLITS[1:]},
    }
    for name in SPLITS:
        write_jsonl_gz(out / f"{name}.jsonl.gz", splits[name])
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(manifest), f"in {out}")


if __name__ == "__main__":
    main()
