"""The sources of parallel text that Debian ships, each with its packages, its licence, and how pairs come out of it.

None of this text is committed: it is fetched where a model is trained. Standard library only.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from corpora import fold, squeeze
from debian import Apt
from documents import read_html, read_man, read_trees, sentences

Pairs = Iterator[tuple[str, str]]


def read_catalogue(path: Path) -> Pairs:
    """(msgid, msgstr) of a compiled gettext catalogue: singular and first plural, without contexts and the header."""
    data = path.read_bytes()
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, ids, strings = struct.unpack_from(order + "III", data, 8)

    def forms(table: int, index: int) -> list[str]:
        length, start = struct.unpack_from(order + "II", data, table + 8 * index)
        return data[start : start + length].decode(errors="replace").split("\0")

    for index in range(count):
        source = forms(ids, index)
        source[0] = source[0].rpartition("\4")[2]
        if source[0]:
            yield from zip(source[:2], forms(strings, index)[:2], strict=False)


def plain_label(text: str) -> str:
    """A user-interface string on one line, without its accelerator mark and what tells it apart from its namesakes."""
    text = re.sub(r"^[\w ]+\^|\|\w{5}$|\([_&~]\w\)", "", text)
    if text.count("_") == 1:
        text = text.replace("_", "")
    return squeeze(re.sub(r"(?<![&\w])[&~](?=\w)|(?<=\w)[&~](?=\w)", "", text))


def read_catalogues(folders: list[Path], language: str) -> Pairs:
    """The strings of every catalogue of `language` in the packages."""
    for folder in folders:
        for path in sorted(folder.rglob(f"{language}/LC_MESSAGES/*.mo")):
            for source, target in read_catalogue(path):
                yield from sentences(plain_label(source), plain_label(target))


def read_libreoffice_help(folders: list[Path], language: str) -> Pairs:
    """Paragraphs of the same id on the same page."""
    english, translated = (folder / "usr/share/libreoffice/help" for folder in folders)
    return read_trees(english / "en-US" / "text", translated / language / "text", "*.html", read_html)


def read_gimp_help(folders: list[Path], language: str) -> Pairs:
    """Blocks in the same place of the same page."""
    english, translated = (next(folder.glob("usr/share/gimp/*/help")) for folder in folders)
    return read_trees(english / "en", translated / language, "*.html", lambda path: read_html(path, names="$^"))


def read_manuals(folders: list[Path], language: str) -> Pairs:
    """Blocks in the same place of the same manual page; labels are left out, for they align by chance."""
    roots = [folder / "usr/share/man" for folder in folders]
    translations = [root / language for root in roots if (root / language).is_dir()]
    for root in roots:
        for translation in translations:
            for section in sorted(root.glob("man[1-8]")):
                pairs = read_trees(section, translation / section.name, "*.gz", read_man)
                yield from (pair for pair in pairs if len(pair[0].split()) > 3)


def read_ding(folders: list[Path], language: str) -> Pairs:
    """The example sentences of the Ding dictionary (German :: English, forms parted by |)."""
    (folder,) = folders
    with (folder / f"usr/share/trans/{language}-en").open(encoding="utf-8") as lines:
        for line in lines:
            target, _, source = line.partition(" :: ")
            forms = source.split("|"), target.split("|")
            if line.startswith("#") or len(forms[0]) != len(forms[1]):
                continue
            for pair in zip(*forms, strict=True):
                english, translated = (plain_entry(text) for text in pair)
                if re.search(r"[.!?]$", english) and len(english.split()) > 2:
                    yield english, translated


def plain_entry(text: str) -> str:
    """The first of the synonyms of a dictionary entry, without remarks."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|<[^>]*>|\([^)]*\)|/[A-Z. ]+/", " ", text)
    return squeeze(bare.partition(";")[0]).strip(" ,")


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph of a Debian control file; a field's further lines keep their first blank."""
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith(" "):
                fields[name] += "\n" + line
            elif line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        yield fields


def paragraphs(description: str) -> list[str]:
    """Synopsis, paragraphs and list items of a package description, one line each."""
    synopsis, *lines = description.split("\n")
    items = [synopsis]
    fresh = True
    for line in lines:
        text = line.strip()
        bullet = re.match(r"([-*+•o]|\d+[.)])\s", text)
        if text == ".":
            fresh = True
        elif fresh or bullet or (line.startswith("  ") and not re.match(r"[-*+•o\d]", items[-1])):
            items.append(text)
            fresh = False
        else:
            items[-1] += " " + text
    return items


def read_descriptions(apt: Apt, language: str) -> Pairs:
    """Package descriptions and their translations, joined by the checksum of the English text."""
    described: dict[str, dict[str, str]] = {"en": {}, language: {}}
    for code, texts in described.items():
        for _, text in apt.lists(f"*_i18n_Translation-{code}*"):
            for fields in stanzas(text):
                if f"Description-{code}" in fields:
                    texts[fields["Description-md5"]] = fields[f"Description-{code}"]
    for checksum, translation in described[language].items():
        forms = paragraphs(described["en"].get(checksum, "")), paragraphs(translation)
        if len(forms[0]) == len(forms[1]):
            for pair in zip(*forms, strict=True):
                yield from sentences(*pair)


def read_packages(apt: Apt) -> dict[str, dict[str, str]]:
    """The control fields of every package by its name; of several versions the last in the lists, by their names."""
    return {fields["Package"]: fields for _, text in apt.lists("*_Packages*") for fields in stanzas(text) if fields}


def family(fields: Mapping[str, str]) -> str:
    """What packages have in common that come from one source, in whatever version: they share text."""
    return fold(fields.get("Source", fields["Package"]).partition(" ")[0])


@dataclass(frozen=True)
class Source:
    """Where pairs come from. `packages` may hold {language} and be a pattern; `read` gets their unpacked folders."""

    name: str
    licence: str
    packages: tuple[str, ...]
    read: Callable[[list[Path], str], Pairs]
    languages: tuple[str, ...] = ()  # empty: every language


SOURCES = (
    Source(
        "libreoffice_help",
        "MPL-2.0",
        ("libreoffice-help-en-us", "libreoffice-help-{language}"),
        read_libreoffice_help,
    ),
    Source("libreoffice_ui", "MPL-2.0", ("libreoffice-l10n-{language}",), read_catalogues),
    Source("wesnoth", "GPL-2.0-or-later", (r"wesnoth-1\.[0-9]+-data",), read_catalogues),
    Source("gimp_help", "GFDL-1.2-or-later", ("gimp-help-en", "gimp-help-{language}"), read_gimp_help),
    Source(
        "manuals",
        "GPL, BSD and others, by page",
        (
            *("manpages", "manpages-dev", "coreutils", "util-linux", "systemd"),
            *("manpages-{language}", "manpages-{language}-dev"),
        ),
        read_manuals,
    ),
    Source("ding", "GPL-2.0-or-later", ("trans-de-en",), read_ding, languages=("de",)),
)
