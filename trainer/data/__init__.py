"""Data: from files or hub data sets to micro-batches, in an order that depends on (data, weights, seed, epoch) alone.

The way of a record, and the words used:

    source --shards--> lane: draw by weight --stages--> encode --block--> sort or pack --rows--> rank --> micro-batches

* source: a list of shards; a shard can be opened at a record offset. Hub data sets come through `datasets` streaming,
  files through fsspec and pyarrow; large files are cut into shards where their format allows.
* lane: one of `data.lanes` (default 48) logical streams. Row i of the whole stream comes from lane i mod lanes, and
  lane l belongs to rank l mod world_size, so rank r receives exactly the rows i = r (mod world_size), whatever the
  number of ranks (a world size that does not divide the lanes is refused). Lane l reads the shards l, l + lanes,
  l + 2 lanes ... of the epoch's shard permutation. Sources of which one has fewer shards than lanes are read as one
  sequence by every rank, and the rows are dealt to the lanes in turn.
* block: `data.block` usable records of a lane (of such a sequence: block x lanes). A block is encoded, shuffled, sorted
  by length or packed, and emitted before the next begins; its order is a pure function of (seed, lane, epoch, block
  index, place in the stream). So the state of a lane is only a position: where in each source the block begins, what
  the mixer owes each, and the turn of its first row. Resuming re-reads one block, at record 10 or 10 billion.
* bucketing: every step has a length quantile, and all lanes emit the samples of that quantile in it, so the samples of
  a global batch have similar lengths, and any split of it into micro-batches pads little.
* packing: a row holds several samples, kept apart by segment ids; a block is packed by itself, nothing is carried over.
* epochs: a lane that ends an epoch begins the next by itself; nothing waits. With a limit on epochs, a lane that has
  finished gives nothing more; ranks without samples take part in the step with a batch of weight zero.

`order.py`, `mixture.py` and `packing.py` are pure functions; `reader.py` draws encoded records from a source,
`lanes.py` makes rows of them, `dealers.py` deals these in this process or another, `loader.py` makes a rank's steps.
`stream.py` is what a configuration names, `dataset.py` one data set of it, `corpus.py` both with the tasks that read
them. `locate.py` finds files, `files.py`, `formats.py`, `remote.py` and `hub.py` read them; `stages/` filter and change
records; `tokenizer.py` stands apart.
"""
