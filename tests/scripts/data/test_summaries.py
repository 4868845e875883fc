"""Summaries and questions out of Debian's package lists (scripts/data/summaries.py, questions.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import questions
import summaries
from corpora import read_jsonl_gz
from debian import NoApt
from sources import family, read_packages

PACKAGES = """Package: {name}
Source: {source} (1.0)
Version: 1.{number}-1
Installed-Size: {number}
Maintainer: "Group {number}" <group@example.org>
Architecture: all
Depends: libc6
Description: tool number {number}
Section: utils
"""
TRANSLATIONS = """Package: {name}
Description-md5: {number}
Description-en: tool number {number}
 This is the long text of the
 tool {number} that {name} brings.
 .
  - an item
"""
NAMES = [("tool", number) for number in range(200)] + [("tool-doc", number) for number in range(200)]


class Lists:
    """An `Apt` with two lists. Packages toolN and toolN-docN come from the source toolN."""

    def __init__(self, *_: object) -> None:
        pass

    def lists(self, pattern: str) -> list[tuple[str, str]]:
        form = PACKAGES if "Packages" in pattern else TRANSLATIONS
        stanzas = [
            form.format(name=f"{name}{n}", source=chr(97 + n % 26) * (1 + n // 26), number=n) for name, n in NAMES
        ]
        return [("list", "\n".join(stanzas))]


def built(module: object, monkeypatch: pytest.MonkeyPatch, out: Path) -> dict[str, list[dict[str, str]]]:
    monkeypatch.setattr(module, "Apt", Lists)
    monkeypatch.setattr(module, "VALIDATION", 0.2)
    monkeypatch.setattr(module, "TEST", 0.2)
    monkeypatch.setattr(sys, "argv", ["build", "--out", str(out)])
    module.main()  # type: ignore[attr-defined]
    return {name: list(read_jsonl_gz(out / f"{name}.jsonl.gz")) for name in ("train", "validation", "test")}


def test_summaries_are_split_by_what_comes_from_one_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    splits = built(summaries, monkeypatch, tmp_path)
    assert all(len(rows) > 20 for rows in splits.values())
    families = [{row["family"] for row in rows} for rows in splits.values()]
    assert not families[0] & families[1] and not families[1] & families[2] and not families[0] & families[2]
    assert {row["summary"] for row in splits["train"]}.isdisjoint(row["summary"] for row in splits["test"])
    row = splits["test"][0]
    number = row["summary"].rpartition(" ")[2]
    assert row["document"].startswith(f"This is the long text of the tool {number} that tool")
    assert row["document"].endswith("\n- an item")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["pairs"]["test"] == len(splits["test"])
    assert 0 < manifest["rouge1_of_first_10_words"]["test"] < 1


def test_every_answer_stands_in_its_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    splits = built(questions, monkeypatch, tmp_path)
    rows = [row for rows in splits.values() for row in rows]
    assert len(rows) == len(NAMES)
    for row in rows:
        assert row["answer"] in row["context"] and "Depends" not in row["context"]
        assert row["context"].split("\n")[0].removeprefix("Package: ") in row["question"]
    assert {row["kind"] for row in rows} == set(questions.KINDS) - {"homepage"}
    assert all(row["answer"].startswith("Group ") for row in rows if row["kind"] == "maintainer")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    constant = manifest["most_frequent_answer"]["test"]
    assert 0 < constant["one for all"] <= constant["one for each kind"] < 1


def test_families_are_of_sources_whatever_their_version() -> None:
    assert family({"Package": "libfoo12", "Source": "foo-1.2 (3)"}) == family({"Package": "foo-1.3"}) == "foo 0 0"
    assert len(read_packages(Lists())) == len(NAMES)  # type: ignore[arg-type]


def test_without_apt_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_apt(*_: object) -> None:
        raise NoApt("apt-get or dpkg-deb is missing")

    for module in (questions, summaries):
        monkeypatch.setattr(module, "Apt", no_apt)
        monkeypatch.setattr(sys, "argv", ["build", "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match="apt-get or dpkg-deb is missing"):
            module.main()
    assert not list(tmp_path.iterdir())
