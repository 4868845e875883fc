"""Data: from files or hub data sets to micro-batches, in an order that depends on (data, seed, epoch) alone.

The way of a record, and the words used:

    source --shards--> lanes --blocks--> order in the block --encode--> samples --deal--> ranks --> micro-batches

* source: a list of shards; a shard can be opened at a record offset. Hub data sets come through `datasets` streaming,
  files (JSON lines, CSV, text, Parquet; local or by URL; .gz/.zst) through fsspec and pyarrow.
* lane: one of `data.lanes` (default 48) logical streams. Sample i of the whole stream comes from lane i mod lanes, and lane l
  belongs to rank l mod world_size, so rank r receives exactly the samples i = r (mod world_size), whatever the number of ranks
  (a world size that does not divide the lanes is refused). Lane l reads the shards l, l + lanes, l + 2 lanes ... of the
  epoch's shard permutation; a source with fewer shards than lanes deals its *records* to lanes in turn instead.
* block: `data.block` consecutive records of a lane. A block is shuffled, encoded, bucketed by length and emitted before the
  next begins; its order is a pure function of (seed, epoch, lane, block index). So the state of a lane is only a cursor:
  epoch, block index, where the block begins (shard index, record offset) and how many samples of it were emitted.
  Resuming re-reads one block, at record 10 or at record 10 billion.
* bucketing: all lanes emit the same length quantile at the same time, so consecutive samples of the stream have similar
  lengths, and any split of a global batch into micro-batches pads little.
* epochs: a lane that ends an epoch begins the next by itself; nothing waits. With a limit on epochs, a lane that has
  finished gives nothing more; ranks without samples take part in the step with a batch of weight zero.
"""
