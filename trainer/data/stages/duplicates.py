"""Stages that leave out copies. Which records are copies is found in one pass over the train split, before training."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.stages import Changed, Removed, check_columns, require, text_of
from trainer.errors import ConfigError
from trainer.tasks import Record

Finding = dict[str, NDArray[np.int64]]
"""Shard -> the offsets, ascending, of the records to leave out. 8 bytes for each of those."""

_PART = 8192
"""Shingles hashed at once: a book then takes 4 MB for a moment, not its own length in megabytes."""

_CANDIDATE_WEIGHTS = (0.1, 0.9)
"""What false and missed candidates matter in the choice of bands: a false one is found out, a missed one is lost."""


class _Places:
    """Ids "shard:offset" in the order of the files, 8 bytes each."""

    def __init__(self) -> None:
        self._shards: list[str] = []
        self._begins: list[int] = []
        self._offsets = array("q")

    def add(self, id: str) -> None:
        shard, _, offset = id.rpartition(":")
        if not self._shards or self._shards[-1] != shard:
            self._shards.append(shard)
            self._begins.append(len(self._offsets))
        self._offsets.append(int(offset))

    def finding(self, rows: NDArray[np.int64] | None = None) -> Finding:
        """The places, or those with the ascending numbers `rows`."""
        offsets = np.array(self._offsets, dtype=np.int64)
        if rows is None:
            rows = np.arange(len(offsets))
        bounds = np.searchsorted(rows, [*self._begins, len(offsets)])
        return {
            shard: offsets[rows[begin:end]]
            for shard, begin, end in zip(self._shards, bounds[:-1], bounds[1:], strict=True)
            if begin < end
        }


class _Duplicates(ABC):
    """What both have in common: columns, and leaving out by id."""

    name: str
    _reason: str

    def __init__(self, columns: Sequence[str]) -> None:
        check_columns(type(self).__name__, columns)
        self._columns = tuple(columns)
        self._dropped: Finding | None = None

    @abstractmethod
    def survey(self, records: Iterable[tuple[str, Record]]) -> Finding:
        """See `NeedsPass`."""

    def adopt(self, finding: Finding) -> None:
        """See `NeedsPass`."""
        self._dropped = finding

    def apply(self, ids: Sequence[str], records: Sequence[Record]) -> list[Record | Changed | Removed]:
        """See `Stage`."""
        assert self._dropped is not None, "a finding is adopted before records are judged"
        removed = Removed(self._reason)
        return [removed if _contains(self._dropped, id) else record for id, record in zip(ids, records, strict=True)]

    def _texts(self, record: Record) -> list[str] | None:
        """The columns, case and white space made equal; None where one is missing."""
        texts = [text_of(record, path) for path in self._columns]
        present = [text for text in texts if text is not None]
        return [" ".join(text.casefold().split()) for text in present] if len(present) == len(texts) else None


class ExactDuplicates(_Duplicates):
    """Leaves out later records whose columns equal an earlier record's, but for case and white space.

    The survey takes 16 bytes a record, and some 40 for a moment at its end. Texts are known by 64 bits of BLAKE2b:
    among a billion different records the chance that any is left out in error is 3 %.
    """

    name = "exact_duplicates"
    _reason = "the same as an earlier record"

    def __init__(self, columns: Sequence[str]) -> None:
        """`columns`: dotted paths, which must all be equal. Raises ConfigError."""
        super().__init__(columns)

    def survey(self, records: Iterable[tuple[str, Record]]) -> Finding:
        """See `NeedsPass`."""
        places, hashes = _Places(), array("Q")
        for id, record in records:
            texts = self._texts(record)
            if texts is not None:
                key = "\n".join(texts).encode(errors="surrogatepass")  # white space was made equal: no text has "\n"
                hashes.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))
                places.add(id)
        values = np.frombuffer(hashes, dtype=np.uint64)
        order = np.argsort(values, kind="stable")  # stable: of equal ones, the first in file order comes first
        values = values[order]
        return places.finding(np.sort(order[1:][values[1:] == values[:-1]]))


class NearDuplicates(_Duplicates):
    """Leaves out records that are nearly equal to an earlier one that stays: the Jaccard similarity of their shingles.

    Shingles and MinHash: Broder 1997, "On the resemblance and containment of documents"; candidates by locality-
    sensitive hashing in bands (Leskovec et al., "Mining of Massive Datasets", 3.4), each verified by the similarity
    that its whole signature estimates, with a standard deviation of sqrt(s (1 - s) / num_perm): 0.035 at 0.8. Of pairs
    at the default threshold, 13 % are never candidates; of those 0.1 above it, 0.1 %.

    The survey takes about 6 KB for each record that stays: millions of records, not billions.
    """

    name = "near_duplicates"

    def __init__(
        self,
        columns: Sequence[str],
        threshold: float = 0.8,
        num_perm: int = 128,
        shingle: int = 5,
        unit: Literal["words", "characters"] = "words",
    ) -> None:
        """Raises ConfigError, or SetupError where datasketch is missing.

        columns: dotted paths, compared together; threshold: the least similarity of a copy; num_perm: values of a
        signature; shingle: so many `unit`s in a row. Words suit documents; single sentences, and scripts without
        spaces, are better cut by characters.
        """
        super().__init__(columns)
        if not 0.1 <= threshold < 1:
            raise ConfigError(
                f"NearDuplicates: threshold={threshold} must be from 0.1 to below 1; for 1 use ExactDuplicates."
            )
        if not 16 <= num_perm <= 4096:
            raise ConfigError(f"NearDuplicates: num_perm={num_perm} must be from 16 to 4096; 128 is usual.")
        if shingle < 1:
            raise ConfigError(f"NearDuplicates: shingle={shingle} must be at least 1.")
        if unit not in ("words", "characters"):
            raise ConfigError(f"NearDuplicates: unit={unit} is not known; use words or characters.")
        self._library = require("datasketch", "datasketch")
        try:
            index = self._library.MinHashLSH(threshold, num_perm, weights=_CANDIDATE_WEIGHTS)
        except ValueError as error:
            raise ConfigError(
                f"NearDuplicates: num_perm={num_perm} is too few for threshold={threshold}; raise it or lower that."
            ) from error
        self._bands = index.b, index.r
        self._reason = f"nearly the same as an earlier record (Jaccard similarity of at least {threshold:g})"
        self._threshold = threshold
        self._num_perm = num_perm
        self._shingle = shingle
        self._unit = unit

    def survey(self, records: Iterable[tuple[str, Record]]) -> Finding:
        """See `NeedsPass`."""
        index = self._library.MinHashLSH(num_perm=self._num_perm, params=self._bands)
        empty = self._library.MinHash(self._num_perm, seed=1)
        kept: list[NDArray[np.uint32]] = []
        dropped = _Places()
        for id, record in records:
            texts = self._texts(record)
            if texts is None:
                continue
            signature = self._signature(empty.copy(), texts)
            least = self._threshold * self._num_perm
            if any(np.count_nonzero(kept[other] == signature.hashvalues) >= least for other in index.query(signature)):
                dropped.add(id)
            else:
                index.insert(len(kept), signature, check_duplication=False)
                kept.append(signature.hashvalues)
        return dropped.finding()

    def _signature(self, signature: Any, texts: Sequence[str]) -> Any:
        shingles = sorted({shingle for column, text in enumerate(texts) for shingle in self._shingles(column, text)})
        for begin in range(0, len(shingles), _PART):
            signature.update_batch(shingles[begin : begin + _PART])
        return signature

    def _shingles(self, column: int, text: str) -> Iterable[bytes]:
        """Every run of so many words or characters, marked with the column; a shorter text is one shingle."""
        units: Sequence[str] = text.split() if self._unit == "words" else text
        glue = " " if self._unit == "words" else ""
        for begin in range(max(1, len(units) - self._shingle + 1)):
            piece = glue.join(units[begin : begin + self._shingle])
            yield f"{column}\n{piece}".encode(errors="surrogatepass")


def _contains(finding: Finding, id: str) -> bool:
    shard, _, offset = id.rpartition(":")
    offsets = finding.get(shard)
    if offsets is None:
        return False
    place = bisect_left(offsets, int(offset))
    return place < len(offsets) and int(offsets[place]) == int(offset)
