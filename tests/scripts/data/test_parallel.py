"""Sources of parallel text and their selection (scripts/data/sources.py, parallel.py)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parallel
import pytest
from corpora import read_jsonl_gz
from debian import Apt, NoApt
from sources import paragraphs, plain_entry, plain_label, read_catalogue, read_descriptions, read_ding


def catalogue(messages: dict[str, str]) -> bytes:
    """A compiled gettext catalogue, little-endian."""
    texts = [text.encode() for pair in messages.items() for text in pair]
    tables, blob = [], b""
    start = 28 + 16 * len(messages)
    for text in texts:
        tables.append(struct.pack("<II", len(text), start + len(blob)))
        blob += text + b"\0"
    head = struct.pack("<IIIIIII", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    return head + b"".join(tables[::2]) + b"".join(tables[1::2]) + blob


def test_catalogues_give_singulars_and_plurals(tmp_path: Path) -> None:
    path = tmp_path / "a.mo"
    path.write_bytes(
        catalogue(
            {"": "Header: x", "Open": "Öffnen", "menu\4Close": "Schließen", "a file\0files": "eine Datei\0Dateien"}
        )
    )
    pairs = [("Open", "Öffnen"), ("Close", "Schließen"), ("a file", "eine Datei"), ("files", "Dateien")]
    assert list(read_catalogue(path)) == pairs


def test_labels_lose_their_marks() -> None:
    assert plain_label("_Save as...") == "Save as..."
    assert plain_label("~Datei|AbC12") == "Datei"
    assert plain_label("addon_tag^Terraforming") == "Terraforming"
    assert plain_label("Black & white") == "Black & white"
    assert plain_label("max_size and min_size") == "max_size and min_size"


def test_dictionary_entries() -> None:
    assert plain_entry("pit pillar [min.]; safety pillar") == "pit pillar"
    assert plain_entry("Es geht (mir) gut. {n}") == "Es geht gut."


def test_dictionary_gives_whole_sentences_only(tmp_path: Path) -> None:
    path = tmp_path / "usr/share/trans/de-en"
    path.parent.mkdir(parents=True)
    path.write_text("# comment :: x\nHaus {n} | Das ist ein Haus. :: house | That is a house.\n", encoding="utf-8")
    assert list(read_ding([tmp_path], "de")) == [("That is a house.", "Das ist ein Haus.")]


def test_descriptions_are_joined_by_their_checksum() -> None:
    class Lists:
        def lists(self, pattern: str) -> Iterator[tuple[str, str]]:
            english = "Package: a\nDescription-md5: 1\nDescription-en: a tool\n First part\n goes on.\n .\n * an item\n"
            german = "Package: a\nDescription-md5: 1\nDescription-de: ein Werkzeug\n Erster Teil.\n .\n * ein Punkt\n"
            yield "list", german if "-de" in pattern else english

    apt: Any = Lists()
    assert list(read_descriptions(apt, "de")) == [
        ("a tool", "ein Werkzeug"),
        ("First part goes on.", "Erster Teil."),
        ("* an item", "* ein Punkt"),
    ]
    assert paragraphs("only a synopsis") == ["only a synopsis"]


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("Turn on the lamp", "Schalte die Lampe ein", None),
        ("12 / 13", "12 / 13", "no words"),
        ("word " * 100, "Wort " * 100, "too long"),
        ("This is a rather long sentence", "Nö, nein", "lengths differ"),
        ("Home Assistant", "Home  assistant", "not translated"),
        ("This was not translated at all", "This was not translated gar nicht", "not translated"),
        ("from 1 to 2 or 3", "von 4 bis 5 oder 6", "numbers differ"),
        ("a <b>bold</b> word", "ein <b>fettes</b> Wort", "markup"),
    ],
)
def test_complaints(source: str, target: str, reason: str | None) -> None:
    assert parallel.complaint(source, target) == reason


def test_without_apt_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoApt, match="Debian or Ubuntu"):
        Apt(tmp_path / "state")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """No apt, and a Home Assistant of forty sentences; counts the downloads."""
    downloads: list[int] = []

    def download(requirement: str, *options: str) -> Path:
        downloads.append(1)
        return tmp_path / "wheel"

    rows = [{"en": f"The room {chr(97 + n)} is warm", "de": f"Zimmer {chr(97 + n)} ist warm"} for n in range(20)]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(parallel, "pip_download", download)
    monkeypatch.setattr(parallel.homeassistant, "read_pairs", lambda wheel, language: rows)
    return downloads


def test_without_apt_home_assistant_is_what_remains(
    offline: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["parallel.py", "--out", str(out)])
    parallel.main()
    manifest = json.loads((out / "manifest.json").read_text())
    splits = {name: list(read_jsonl_gz(out / f"{name}.jsonl.gz")) for name in manifest["pairs"]}
    assert {name: len(rows) for name, rows in splits.items()} == manifest["pairs"]
    assert sum(manifest["pairs"].values()) == 20 and splits["train"][0].keys() == {"en", "de", "source"}
    assert manifest["sources"]["homeassistant"]["licence"] == "Apache-2.0"
    assert manifest["failed"].keys() >= {"libreoffice_help", "ding", "descriptions"}
    assert "apt-get or dpkg-deb is missing" in capsys.readouterr().err
    parallel.main()
    assert len(offline) == 1, "what was fetched stays fetched"
