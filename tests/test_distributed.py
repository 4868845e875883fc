"""How the ranks of a start find each other where a store remembers those of earlier ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from trainer.distributed import _meet


def test_the_ranks_of_every_start_share_a_name_of_their_own(free_port: int) -> None:
    """Three starts on a store that outlives them, the second of more ranks; words of the gone mislead nobody."""
    seconds = timedelta(seconds=60)
    names = set()
    server = dist.TCPStore("127.0.0.1", free_port, is_master=True, timeout=seconds)
    for world_size in (3, 4, 2):
        clients = [dist.TCPStore("127.0.0.1", free_port, timeout=seconds) for _ in range(world_size)]
        with ThreadPoolExecutor(world_size) as ranks:
            met = set(ranks.map(lambda rank, world_size=world_size, clients=clients: _meet(
                clients[rank], rank, world_size, 60.0), range(world_size)))  # fmt: skip
        assert len(met) == 1
        names |= met
    assert len(names) == 3 and server.num_keys() > 0


def test_a_rank_that_does_not_come_is_named(free_port: int) -> None:
    store = dist.TCPStore("127.0.0.1", free_port, is_master=True, timeout=timedelta(seconds=60))
    store.set("word/1", "of a rank that has gone")
    with pytest.raises(dist.DistStoreError, match=r"ranks \[1\] did not come within 0.05 s"):
        _meet(store, 0, 2, 0.05)
