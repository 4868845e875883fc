"""Fetch recordings with their texts: what `experiment=speech_ru` trains on.

    python scripts/data/speech.py [--out data/speech_ru]

Takes Debian's package festvox-ru: 620 Russian sentences (99 minutes, 16 kHz) that one speaker read for a voice of
Festival, with a list of when each sound and pause is heard. A sentence takes ten seconds, too long to learn from in
minutes, so it is cut at its pauses; which words stand between two pauses comes from laying sounds and letters side by
side. Writes {train,validation,test}.parquet (columns audio {bytes, path}, text, seconds) and manifest.json. Sentences
are dealt to splits whole, and train has no text that is held out. Needs apt, and pyarrow.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpora import SPLITS, split_name
from debian import Apt, NoApt

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "festvox-ru"
VOICE = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
LICENCE = "BSD-like, (c) 2005 Nickolay V. Shmyrev"
VALIDATION, TEST = 0.06, 0.08  # shares of the sentences
SILENCE = 0.1  # seconds of a pause that stay on each side of a cut
MAX_SHIFT = 1  # letters between a pause and the border of words that it is taken for
VOWELS = "аеёиоуыэюя"
# consonants as the voice writes them; soft ones are written twice
# consonants as the voice writes them; soft ones are written twice
SOUNDS = ["b", "c", "ch", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "sch", "sh", "t", "v", "z", "zh"]
CONSONANTS = dict(zip(SOUNDS, "бцчдфгхйклмнпрсщштвзж", strict=True))


@dataclass(frozen=True)
class Piece:
    """Words between two pauses, and when they are heard, in seconds."""

    text: str
    begin: float
    end: float


def sounds_of(labels: str) -> list[tuple[float, float, str]]:
    """(begin, end, sound) of a file of labels; a sound as a letter, "V" for any vowel, "" for a pause."""
    found = []
    begin = 0.0
    for line in labels.splitlines():
        fields = line.split()
        if len(fields) != 3:
            continue
        end, name = float(fields[0]), fields[2]
        half = name[: len(name) // 2]
        plain = half if len(name) > 1 and name == half * 2 else name
        found.append((begin, end, "" if name in ("pau", "#") else CONSONANTS.get(plain, "V")))
        begin = end
    return found


def places_of(letters: Sequence[str], sounds: Sequence[str]) -> list[int]:
    """For each n up to the number of sounds, how many letters the first n stand for (Levenshtein 1966)."""
    rows = [list(range(len(letters) + 1))]
    for sound in sounds:
        above, row = rows[-1], [len(rows)]
        for index, letter in enumerate(letters):
            row.append(min(above[index] + (letter != sound), above[index + 1] + 1, row[index] + 1))
        rows.append(row)
    place, places = len(letters), [len(letters)]
    for number in range(len(sounds), 0, -1):
        row, above = rows[number], rows[number - 1]
        while place and row[place] == row[place - 1] + 1 and row[place] < above[place - 1] + 1:
            place -= 1  # a letter that is not heard
        if place and row[place] == above[place - 1] + (letters[place - 1] != sounds[number - 1]):
            place -= 1
        places.append(place)
    return places[::-1]


def cut(text: str, sounds: Sequence[tuple[float, float, str]]) -> Iterator[Piece]:
    """A sentence cut at those of its pauses that fall between words."""
    words = re.findall(r"[\w-]*\w", text.lower())
    letters = [["V" if letter in VOWELS else letter for letter in re.sub(r"[ьъ-]", "", word)] for word in words]
    borders = [sum(map(len, letters[:count])) for count in range(len(words) + 1)]
    heard = [sound for _, _, sound in sounds if sound]
    places = places_of([letter for word in letters for letter in word], heard)
    done = count = 0
    begin = end = None
    for start, stop, sound in [*sounds, (sounds[-1][1], sounds[-1][1], "")]:
        if sound:
            begin, end, count = (start if begin is None else begin), stop, count + 1
        elif begin is not None and end is not None:
            nearest = min(range(len(borders)), key=lambda index: abs(borders[index] - places[count]))
            near = abs(borders[nearest] - places[count]) <= MAX_SHIFT or nearest == len(words)
            if near and nearest > done:
                yield Piece(" ".join(words[done:nearest]), begin, end)
                done, begin = nearest, None


def records(voice: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(name of the sentence, record) of all pieces."""
    sentences = (voice / "etc/txt.done.data").read_text(encoding="utf-8")
    for name, text in re.findall(r'\(\s*(\w+)\s+"(.*?)"\s*\)', sentences):
        labels = (voice / "lab" / f"{name}.lab").read_text()
        pieces = list(cut(text.replace("+", ""), sounds_of(labels)))  # a plus marks the stressed vowel
        with wave.open(str(voice / "wav" / f"{name}.wav")) as recording:
            rate, total = recording.getframerate(), recording.getnframes()
            for number, piece in enumerate(pieces):
                first = max(0, int((piece.begin - SILENCE) * rate))
                last = min(total, int((piece.end + SILENCE) * rate))
                recording.setpos(first)
                audio = {"bytes": wav_bytes(recording, last - first), "path": f"{name}_{number}.wav"}
                yield name, {"audio": audio, "text": piece.text, "seconds": (last - first) / rate}


def wav_bytes(recording: wave.Wave_read, count: int) -> bytes:
    """The next `count` samples as a file of their own."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setparams(recording.getparams())
        out.writeframes(recording.readframes(count))
    return buffer.getvalue()


def split(voice: Path) -> dict[str, list[dict[str, object]]]:
    """The records of each split."""
    splits: dict[str, list[dict[str, object]]] = {name: [] for name in SPLITS}
    for sentence, record in records(voice):
        splits[split_name(sentence, VALIDATION, TEST)].append(record)
    held_out = {record["text"] for name in SPLITS[1:] for record in splits[name]}
    splits["train"] = [record for record in splits["train"] if record["text"] not in held_out]
    return splits


def main() -> None:
    """Parse the command line, fetch, cut, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "speech_ru")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        try:
            apt = Apt(Path(temporary, "apt"))
            version = apt.version(PACKAGE)
            splits = split(apt.unpack(PACKAGE, Path(temporary)) / VOICE)
        except NoApt as error:
            sys.exit(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, object] = {"package": f"{PACKAGE}={version}", "licence": LICENCE}
    for name, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), options.out / f"{name}.parquet", row_group_size=256)
        minutes = sum(float(str(row["seconds"])) for row in rows) / 60
        manifest[name] = {"recordings": len(rows), "minutes": round(minutes, 1)}
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(manifest), f"in {options.out}")


if __name__ == "__main__":
    main()
