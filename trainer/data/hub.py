"""Sources that Hugging Face `datasets` streams: by hub name, or a local folder that is a data set repository."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trainer.errors import DataError
from trainer.tasks import BadRecord, Record

if TYPE_CHECKING:
    from datasets import IterableDataset


class HubSource:
    """The shards of a streamed data set."""

    def __init__(self, path: str, name: str | None, split: str, min_shards: int) -> None:
        """Shards fewer than `min_shards` are cut further where `datasets` can (row groups of Parquet).

        Raises DataError where the data set, its configuration or its split is not to be had.
        """
        import datasets

        try:
            self._dataset: IterableDataset = datasets.load_dataset(path, name, split=split, streaming=True)
            for column, feature in (self._dataset.features or {}).items():
                if isinstance(feature, datasets.Audio):  # as bytes, which tasks decode (`trainer.data.audio`)
                    self._dataset = self._dataset.cast_column(column, datasets.Audio(decode=False))
            if self._dataset.num_shards < min_shards:
                self._dataset = self._dataset.reshard()
        except Exception as error:  # `datasets` lets through what its many libraries raise
            raise DataError(
                f"data.path={path}, data.name={name}, split {split}: neither a local file or folder, nor a data set"
                f" that `datasets` could open: {error}"
            ) from error
        count = self._dataset.num_shards
        self._names = [f"{split}-{index:05d}-of-{count:05d}" for index in range(count)]

    @property
    def shards(self) -> Sequence[str]:
        """`split-INDEX-of-COUNT`: the hub's files have no public names here."""
        return self._names

    def open(self, shard_index: int, offset: int) -> Iterator[Record | BadRecord]:
        """See `trainer.data.sources.Source`."""
        # exact for every kind of data set; a state dict is not, where tables are resumed at their beginning
        shard = self._dataset.shard(len(self._names), shard_index).skip(offset)
        count = offset
        try:
            for record in shard:
                yield record
                count += 1
        except Exception as error:  # as above
            raise DataError(f"{self._names[shard_index]}: cannot be read at record {count}: {error}") from error
