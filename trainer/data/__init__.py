"""Data: from files or hub data sets to micro-batches, in an order that depends on (data, seed, epoch) alone.

The way of a record, and the words used:

    source --shards--> lanes --blocks--> encode --> order in the block --deal--> ranks --> micro-batches

* source: a list of shards; a shard can be opened at a record offset. Hub data sets come through `datasets` streaming,
  files (JSON lines, CSV, text, Parquet; local or by URL; .gz/.zst/.bz2/.xz) through fsspec and pyarrow.
* lane: one of `data.lanes` (default 48) logical streams. Sample i of the whole stream comes from lane i mod lanes, and
  lane l belongs to rank l mod world_size, so rank r receives exactly the samples i = r (mod world_size), whatever the
  number of ranks (a world size that does not divide the lanes is refused). Lane l reads the shards l, l + lanes,
  l + 2 lanes ... of the epoch's shard permutation. A source with fewer shards than lanes is read as one sequence by
  every rank, and its samples are dealt to the lanes in turn.
* block: `data.block` consecutive records of a lane (of such a sequence: block x lanes records). A block is encoded,
  shuffled, bucketed by length and emitted before the next begins; its order is a pure function of (seed, lane, epoch,
  block index, place in the stream). So the state of a lane is only a cursor: epoch, block index, where the block begins
  (shard, record offset, place). Resuming re-reads one block, at record 10 or at record 10 billion.
* bucketing: every step has a length quantile, and all lanes emit the samples of that quantile in it, so the samples of
  a global batch have similar lengths, and any split of it into micro-batches pads little.
* epochs: a lane that ends an epoch begins the next by itself; nothing waits. With a limit on epochs, a lane that has
  finished gives nothing more; ranks without samples take part in the step with a batch of weight zero.

`order.py` is the order as pure functions, `lanes.py` the cursors, `loader.py` the steps of a rank; `stream.py` is what
a configuration names, `locate.py` finds its files, `files.py` and `hub.py` read them; `tokenizer.py` stands apart.
"""
