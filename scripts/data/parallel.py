"""Fetch all parallel text that pip and apt can give: what `experiment=translation_base` trains on.

    python scripts/data/parallel.py [--language de] [--out data/parallel_en_de]

Writes {train,validation,test}.jsonl.gz (keys "en", the language, "source") and manifest.json (counts, versions,
licences, what was left out). Standard library only; nothing is installed. Can be interrupted: a source that is done
stays done. Without apt (not Debian or Ubuntu) only the Home Assistant strings come in. These keep the splits of the
packaged corpus, so a model trained on this has not seen the packaged test split either.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import homeassistant
from corpora import SPLITS, Pair, copy_bleu, normalise, pip_download, split_pairs, write_jsonl_gz
from debian import Apt, NoApt
from sources import SOURCES, Pairs, Source, read_descriptions

ROOT = Path(__file__).resolve().parents[2]
VALIDATION, TEST = 0.004, 0.008  # shares of the distinct folded sources
MAX_CHARACTERS = 400
MAX_OVERLAP = 0.6  # of the source's words; more is text that was not translated


def complaint(source: str, target: str) -> str | None:
    """Why a pair is no translation, in a word or two; None if it may be one."""
    if not all(re.search(r"[^\W\d_]{2}", text) for text in (source, target)):
        return "no words"
    if re.search(r"</?\w+>", source + target):
        return "markup"
    if max(len(source), len(target)) > MAX_CHARACTERS:
        return "too long"
    if len(source) > 20 and not 1 / 3 < len(target) / len(source) < 3:
        return "lengths differ"
    words = [set(re.findall(r"\w+", text.casefold())) for text in (source, target)]
    if normalise(source) == normalise(target):
        return "not translated"
    if len(source.split()) > 3 and len(words[0] & words[1]) >= MAX_OVERLAP * len(words[0]):
        return "not translated"
    numbers = [set(re.findall(r"\d+", text)) for text in (source, target)]
    if len(numbers[0]) > 2 and len(numbers[0] & numbers[1]) * 2 < len(numbers[0]):
        return "numbers differ"
    return None


class Harvest:
    """Raw pairs by source, kept in `folder` so that an interrupted call goes on where it was."""

    def __init__(self, folder: Path, language: str) -> None:
        self.folder = folder
        self.language = language
        self.versions: dict[str, dict[str, str]] = {}
        self.failures: dict[str, str] = {}
        self.pairs: dict[str, list[tuple[str, str]]] = {}

    def take(self, name: str, versions: dict[str, str], pairs: Iterable[tuple[str, str]]) -> None:
        """Keep the pairs of a source, in memory and on disk."""
        self.pairs[name] = list(dict.fromkeys(pairs))
        self.versions[name] = versions
        rows = ({"en": source, self.language: target} for source, target in self.pairs[name])
        write_jsonl_gz(self.folder / f"{name}.jsonl.gz", [{"versions": versions}, *rows])
        print(f"{name:20} {len(self.pairs[name]):8,} pairs", flush=True)

    def recall(self, name: str) -> bool:
        """Load a source from an earlier call; False if there is none."""
        path = self.folder / f"{name}.jsonl.gz"
        if not path.exists():
            return False
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            self.versions[name] = json.loads(next(lines))["versions"]
            self.pairs[name] = [(row["en"], row[self.language]) for row in map(json.loads, lines)]
        print(f"{name:20} {len(self.pairs[name]):8,} pairs, from an earlier call", flush=True)
        return True

    def fail(self, name: str, reason: str) -> None:
        """Go on without a source, and say so now and in the manifest."""
        self.failures[name] = reason
        print(f"{name:20} left out: {reason}", file=sys.stderr, flush=True)


def unpack_and_read(apt: Apt, source: Source, language: str, folder: Path) -> tuple[dict[str, str], Pairs]:
    """Package versions and pairs of one source."""
    packages = [apt.newest(pattern.format(language=language)) for pattern in source.packages]
    folders = [apt.unpack(package, folder) for package in packages]
    return {package: apt.version(package) for package in packages}, source.read(folders, language)


def fetch(harvest: Harvest) -> None:
    """Take every source that this machine can get."""
    language = harvest.language
    wanted = [source for source in SOURCES if not source.languages or language in source.languages]
    if not harvest.recall("homeassistant"):
        wheel = pip_download(homeassistant.RELEASE, "--python-version", homeassistant.PYTHON)
        rows = homeassistant.read_pairs(wheel, language)
        release = dict([homeassistant.RELEASE.split("==")])
        harvest.take("homeassistant", release, ((row["en"], row[language]) for row in rows))
    missing = [name for name in (*(source.name for source in wanted), "descriptions") if not harvest.recall(name)]
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        try:
            apt = Apt(Path(temporary, "apt"), ("en", language))
        except NoApt as error:
            for name in missing:
                harvest.fail(name, str(error))
            return
        if "descriptions" in missing:
            harvest.take("descriptions", {}, read_descriptions(apt, language))
        for source in wanted:
            if source.name not in missing:
                continue
            with tempfile.TemporaryDirectory(dir=temporary) as unpacked:
                try:
                    harvest.take(source.name, *unpack_and_read(apt, source, language, Path(unpacked)))
                except NoApt as error:
                    harvest.fail(source.name, str(error))


def select(harvest: Harvest) -> tuple[list[Pair], dict[str, Counter[str]]]:
    """The distinct acceptable pairs of all sources, and per source how many were left out and why."""
    seen: set[tuple[str, str]] = set()
    chosen: list[Pair] = []
    left_out: dict[str, Counter[str]] = {}
    for name in sorted(harvest.pairs, key=lambda name: name != "homeassistant"):
        reasons: Counter[str] = Counter()
        for source, target in harvest.pairs[name]:
            key = normalise(source), normalise(target)
            reason = "repeated" if key in seen else None if name == "homeassistant" else complaint(source, target)
            if reason:
                reasons[reason] += 1
                continue
            seen.add(key)
            chosen.append({"en": source, harvest.language: target, "source": name})
        left_out[name] = reasons
    return chosen, left_out


def shares(pair: Pair) -> tuple[float, float]:
    """Validation and test shares: Home Assistant's are those of the packaged corpus."""
    if pair["source"] == "homeassistant":
        return homeassistant.VALIDATION, homeassistant.TEST
    return VALIDATION, TEST


def main() -> None:
    """Parse the command line, fetch, select, split, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="de", help="de, fr, es or it (default: de)")
    parser.add_argument("--out", type=Path, help="default: data/parallel_en_LANGUAGE in the repository")
    options = parser.parse_args()
    language = options.language
    out = options.out or ROOT / "data" / f"parallel_en_{language}"
    harvest = Harvest(out / "parts", language)
    fetch(harvest)
    chosen, left_out = select(harvest)
    splits = split_pairs(chosen, ("en", language), shares)
    licences = {source.name: source.licence for source in SOURCES}
    licences |= {"homeassistant": "Apache-2.0", "descriptions": "that of each package"}
    counts = {name: Counter(pair["source"] for pair in splits[name]) for name in SPLITS}
    manifest = {
        "pairs": {name: len(splits[name]) for name in SPLITS},
        "copy_bleu": {name: copy_bleu(splits[name], "en", language) for name in ("validation", "test")},
        "sources": {
            name: {
                "licence": licences[name],
                "versions": harvest.versions[name],
                "fetched": len(pairs),
                "left_out": left_out[name],
                **{split: counts[split][name] for split in SPLITS},
            }
            for name, pairs in harvest.pairs.items()
        },
        "failed": harvest.failures,
    }
    for name in SPLITS:
        write_jsonl_gz(out / f"{name}.jsonl.gz", splits[name])
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(manifest["pairs"]), "copy BLEU", manifest["copy_bleu"], f"in {out}")


if __name__ == "__main__":
    main()
