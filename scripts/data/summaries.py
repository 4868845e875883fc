"""Fetch long and short descriptions of Debian packages: what `experiment=summarisation` trains on.

    python scripts/data/summaries.py [--out data/summaries]

Writes {train,validation,test}.jsonl.gz (keys "document", "summary", "family") and manifest.json (counts, and what the
first words of the document score). The descriptions are under the licences of their packages: fetched, never
committed. Needs apt, so Debian or Ubuntu; of Python the standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from corpora import SPLITS, Pair, fold, normalise, split_pairs, squeeze, write_jsonl_gz
from debian import Apt, NoApt
from sources import family, paragraphs, read_packages, stanzas

ROOT = Path(__file__).resolve().parents[2]
VALIDATION, TEST = 0.02, 0.04  # shares of the families
MIN_CHARACTERS = 40  # of a document; shorter ones say nothing
LEAD_WORDS = 10


def read_pairs(translations: Sequence[str], families: Mapping[str, str]) -> Iterator[Pair]:
    """Distinct pairs out of the lists of English descriptions; families: of packages by name."""
    seen: set[tuple[str, str]] = set()
    for text in translations:
        for fields in stanzas(text):
            synopsis, *rest = paragraphs(fields.get("Description-en", ""))
            document, summary = "\n".join(map(squeeze, rest)), squeeze(synopsis)
            key = normalise(document), normalise(summary)
            if len(document) >= MIN_CHARACTERS and re.search(r"\w\w", summary) and key not in seen:
                seen.add(key)
                name = fields["Package"]
                yield {"document": document, "summary": summary, "family": families.get(name, fold(name))}


def lead_score(pairs: Sequence[Pair]) -> float | None:
    """Mean ROUGE-1 of the first words of the documents; None without pairs or without rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    if not pairs:
        return None
    scorer = RougeScorer(["rouge1"])
    leads = [(pair["summary"], " ".join(pair["document"].split()[:LEAD_WORDS])) for pair in pairs]
    return float(sum(scorer.score(*pair)["rouge1"].fmeasure for pair in leads) / len(leads))


def main() -> None:
    """Parse the command line, fetch, split by family, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "summaries", help="default: data/summaries")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        try:
            apt = Apt(Path(temporary, "apt"))
        except NoApt as error:
            sys.exit(str(error))
        families = {name: family(fields) for name, fields in read_packages(apt).items()}
        pairs = list(read_pairs([text for _, text in apt.lists("*_i18n_Translation-en*")], families))
    splits = split_pairs(pairs, ("document", "summary"), lambda _: (VALIDATION, TEST), lambda pair: pair["family"])
    manifest = {
        "licence": "that of each package",
        "pairs": {name: len(splits[name]) for name in SPLITS},
        f"rouge1_of_first_{LEAD_WORDS}_words": {name: lead_score(splits[name]) for name in ("validation", "test")},
    }
    for name in SPLITS:
        write_jsonl_gz(out / f"{name}.jsonl.gz", splits[name])
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(manifest), f"in {out}")


if __name__ == "__main__":
    main()
