"""What does not compute, at up to 16,384 ranks: the real functions of the trainer, on one machine, with files and
connections of so many ranks, and models where one machine cannot be so many.

    python scripts/bench/control_plane.py                      # all parts, 64 to 16,384 ranks: about 4 minutes
    python scripts/bench/control_plane.py parts=load,commit ranks=64,1024

What is measured: rendezvous (a real TCPStore; rank 0's side of `trainer.distributed`), signs of life (real files), a
commit (what ranks tell, manifest and state as written and parsed), loading (real shards with the header of a ZeRO-3
rank), positions of lanes. What is a model: the vote of all ranks before a step, by the latency of a message. The
exponent is that of time in ranks, by least squares in the logarithms of the largest three sizes.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import exponent

from trainer import distributed
from trainer.checkpoint import save
from trainer.checkpoint.load import Checkpoint, Reader
from trainer.checkpoint.parse import parse_manifest, parse_state
from trainer.commands import run_command
from trainer.data.lanes import Position, is_lane_state
from trainer.engine.base import Fragment
from trainer.guards.heartbeats import Heartbeat, beat_seconds, read_heartbeats, who_is_late, witnesses
from trainer.parallel.layout import members
from trainer.state import TrainState

SIZES = (64, 256, 1024, 4096, 16_384)
MATRICES, LAYERS = 7, 126
"""Parameters of a layer and layers of the 405B decoder."""
STATES = ("master", "exp_avg", "exp_avg_sq")
HOP_SECONDS = 50e-6
"""A small message from rank to rank by gloo over a data centre's TCP; an assumption, for the model of the vote."""


@dataclass(frozen=True)
class Options:
    """parts: names, separated by commas, or all; ranks: numbers."""

    parts: str = "all"
    ranks: str = ",".join(map(str, SIZES))
    json: str | None = None


Rows = dict[str, float]
"""Seconds, or bytes where the name ends so, of one size."""


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    value = action()
    return time.perf_counter() - begin, value


def rendezvous(ranks: int, folder: Path) -> Rows:
    """So many connections to one store in a process of its own; and the meeting of rank 0 with the others, who take
    turns on 32 of them."""
    seconds = timedelta(seconds=300)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve_store, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    try:
        with ThreadPoolExecutor(128) as threads:
            count = min(ranks, _most_files())
            connect, clients = timed(
                lambda: list(threads.map(lambda _: dist.TCPStore("localhost", port, timeout=seconds), range(count)))
            )
        speakers = clients[:32]
        with ThreadPoolExecutor(len(speakers)) as threads:
            others = [
                threads.submit(_answer, store, range(1 + index, ranks, len(speakers)))
                for index, store in enumerate(speakers)
            ]
            rank_zero = dist.TCPStore("localhost", port, timeout=seconds)
            meet, _ = timed(lambda: distributed._meet(rank_zero, 0, ranks, 300.0))
            for other in others:
                other.result()
    finally:
        ours.send(None)
        server.join()
    return {"connections to the store, held (number)": len(clients), "connections: made": connect, "meeting": meet}


def _most_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500


def _serve_store(connection: Any) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    connection.send(store.port)
    connection.recv()


def _answer(store: dist.TCPStore, ranks: range) -> None:
    """What ranks above 0 do in `trainer.distributed._meet`, for several of them in turn."""
    for rank in ranks:
        store.set(f"word/{rank}", f"of{rank}")
    for rank in ranks:
        store.set(f"{store.get(f'answer/of{rank}').decode()}/{rank}", "")


def groups(ranks: int, folder: Path) -> Rows:
    """Which ranks share matrices and sequences with a rank, of 8 x 2."""
    seconds, _ = timed(lambda: [list(group) for group in members(ranks // 2, ranks, 2, 8)])
    return {"members of a rank's groups": seconds}


def heartbeats(ranks: int, folder: Path) -> Rows:
    """A sign of life of every rank, read by one witness."""
    now = time.time()
    beats = [Heartbeat(rank, f"node-{rank // 8}", rank, 7, "agree", now - 9, now) for rank in range(ranks)]
    write, _ = timed(lambda: [beat.write(folder / "heartbeats") for beat in beats])
    read, found = timed(lambda: read_heartbeats(folder / "heartbeats", ranks, now - 60))
    say, _ = timed(lambda: who_is_late({rank: beat for rank, beat in found.items() if rank != 5}, ranks, now, 60.0))
    return {
        "signs of life: all ranks' files written": write,
        "signs of life: read by a witness": read,
        "signs of life: who is late": say,
        "signs of life: files a second (number)": ranks / beat_seconds(ranks),
        "signs of life: files read when a job hangs (number)": len(witnesses(ranks)) * ranks,
    }


def logs(ranks: int, folder: Path) -> Rows:
    """A file for the messages of each rank, in one folder."""
    (folder / "logs").mkdir()
    write, _ = timed(
        lambda: [(folder / "logs" / f"rank_{rank:05d}.log").write_text("a message\n") for rank in range(ranks)]
    )
    listing, _ = timed(lambda: sorted((folder / "logs").glob("rank_*.log")))
    return {"logs: a file of each rank": write, "logs: listed": listing}


class Sharded:
    """A rank's pieces under ZeRO-3 of a model with the 405B decoder's parameters: an engine, as far as saving asks."""

    fragments_stay = True

    def __init__(self, rank: int, ranks: int, layers: int) -> None:
        self.rank, self.ranks, self.layers = rank, ranks, layers

    def fragments(self) -> Iterator[Fragment]:
        for layer in range(self.layers):
            for matrix in range(MATRICES):
                for state in STATES:
                    name = f"layers.{layer}.block.{matrix}.weight"
                    yield Fragment(name, state, self.rank, (self.ranks, 1), torch.zeros(1))

    def scalars(self) -> dict[str, float]:
        return {"step": 7.0, "loss_scale": 1.0}


def lane_state(lane: int, ranks: int) -> dict[str, Any]:
    """As `LocalDealer` tells it, some thousands of steps on."""
    return {**Position(((3, lane, 123_456),), (0.0,), 77, 40_000, 39_000, 38_000).to_state(), "place": 40_000 * ranks}


def commit(ranks: int, folder: Path) -> Rows:
    """What ranks tell rank 0 of their shards (one a rank, with one lane), and what it makes of it."""
    state = TrainState(step=7)
    shards = []
    told = 0
    for rank in range(ranks):
        if rank < 3:
            snapshot = save._take_snapshot(Sharded(rank, ranks, LAYERS), state, {}, asynchronous=True)  # type: ignore[arg-type]
        lanes = {rank: lane_state(rank, ranks)}
        shapes = snapshot.shapes if rank < 3 else {}
        shards.append(save._Shard(f"shard_{rank:05d}.safetensors", 10**9, "0" * 64, shapes, lanes))
    told = sum(len(pickle.dumps(shard)) for shard in shards)
    unpickle, _ = timed(lambda: [pickle.loads(pickle.dumps(shard)) for shard in shards])
    seal, _ = timed(lambda: save._seal(folder, snapshot, shards, {"world_size": ranks}))
    manifest, written = (folder / "manifest.json").read_bytes(), (folder / "state.json").read_bytes()
    parse, found = timed(lambda: (parse_manifest(manifest, "manifest"), parse_state(written, "state")))
    lanes = found[1][2]
    return {
        "commit: told to rank 0 (bytes)": told,
        "commit: told, packed and unpacked": unpickle,
        "commit: state.json and manifest.json written": seal,
        "checkpoint: manifest.json (bytes)": len(manifest),
        "checkpoint: state.json (bytes)": len(written),
        "checkpoint: both parsed": parse,
        "lanes: every state checked, as each rank does": timed(lambda: all(map(is_lane_state, lanes.values())))[0],
    }


def load(ranks: int, folder: Path) -> Rows:
    """Shards with the pieces of a ZeRO-3 rank of 4 layers: a rank of the same number of ranks finds its own; one of
    half as many finds two; and one that opens all, as every rank once did (the last, up to 4,096)."""
    layers = 4
    files = {f"shard_{rank:05d}.safetensors": {} for rank in range(ranks)}
    for rank, name in enumerate(files):
        _write_shard(folder / name, Sharded(rank, ranks, layers))
    checkpoint = Checkpoint(folder, {"files": files}, TrainState(), {}, {})
    rows = {
        "load: a rank of as many ranks plans and reads": timed(lambda: _fill(checkpoint, 5, ranks, layers))[0],
        "load: a rank of half as many": timed(lambda: _fill(checkpoint, 5, ranks // 2, layers, width=2))[0],
    }
    if ranks <= 4096:

        def open_all() -> None:
            with Reader(checkpoint):
                pass

        rows["load: all shards opened (4 of 126 layers)"] = timed(open_all)[0]
    return rows


def _write_shard(path: Path, engine: Sharded) -> None:
    """As `write_pieces` does, of one number each, without the way through tensors."""
    header: dict[str, Any] = {"__metadata__": {}}
    for place, fragment in enumerate(engine.fragments()):
        header["__metadata__"][f"{fragment.parameter}|{fragment.key}"] = json.dumps(fragment.shape)
        offsets = [4 * place, 4 * place + 4]
        header[f"{fragment.parameter}|{fragment.key}|{fragment.start}"] = {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * (place + 1)))


def _fill(checkpoint: Checkpoint, rank: int, ranks: int, layers: int, width: int = 1) -> None:
    with Reader(checkpoint, rank / ranks) as reader:
        for fragment in Sharded(rank, ranks, layers).fragments():
            assert reader.shape(fragment.parameter, fragment.key) is not None
            reader.read_into(fragment.parameter, fragment.key, fragment.start * width, torch.empty(width))


def vote(ranks: int, folder: Path) -> Rows:
    """The two small all-reduces before a step, by the alpha-beta model: one message after another."""
    doubling = 2 * math.ceil(math.log2(ranks)) * HOP_SECONDS
    return {"vote before a step (model)": doubling, "vote by gloo's ring (model)": 2 * 2 * (ranks - 1) * HOP_SECONDS}


def mesh(ranks: int, folder: Path) -> Rows:
    """gloo's set-up by ranks that are threads of this process, up to 64: each with each, and as needed."""
    if ranks > 64:
        return {}
    rows = {}
    for lazy in (False, True):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        child = context.Process(target=_make_mesh, args=(theirs, ranks, lazy), daemon=True)
        child.start()
        seconds, connections = ours.recv()
        child.join()
        how = "as needed" if lazy else "each with each"
        rows |= {f"gloo {how}": seconds, f"gloo {how}, open files of {ranks} ranks (number)": connections}
    return rows


def _make_mesh(connection: Any, ranks: int, lazy: bool) -> None:
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(lazy))
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    kept: list[Any] = []
    barrier = threading.Barrier(ranks)

    def join(rank: int) -> float:
        client = dist.TCPStore("localhost", store.port)
        barrier.wait()
        begin = time.perf_counter()
        kept.append(dist.ProcessGroupGloo(dist.PrefixStore("group", client), rank, ranks, timedelta(seconds=60)))
        return time.perf_counter() - begin

    with ThreadPoolExecutor(ranks) as threads:
        seconds = max(threads.map(join, range(ranks)))
    connection.send((seconds, len(os.listdir("/proc/self/fd"))))
    os._exit(0)


PARTS = {part.__name__: part for part in (rendezvous, mesh, groups, vote, heartbeats, logs, commit, load)}


def main(options: Options) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    torch.set_num_threads(1)
    sizes = sorted(map(int, options.ranks.split(",")))
    chosen = PARTS if options.parts == "all" else {name: PARTS[name] for name in options.parts.split(",")}
    table: dict[str, dict[int, float]] = {}
    for part in chosen.values():
        for ranks in sizes:
            folder = Path(tempfile.mkdtemp(prefix="control_plane_"))
            try:
                for name, value in part(ranks, folder).items():
                    table.setdefault(name, {})[ranks] = value
            finally:
                shutil.rmtree(folder)
    width = max(map(len, table))
    print(f"{'':<{width}}  " + "".join(f"{ranks:>12,}" for ranks in sizes) + "    exponent")
    for name, values in table.items():
        cells = "".join(f"{_shown(name, values.get(ranks)):>12}" for ranks in sizes)
        last = [max(value, 1e-9) for value in values.values()][-3:]
        fitted = f"{exponent([*values][-3:], last):.2f}" if len(values) > 2 else ""
        print(f"{name:<{width}}  {cells}  {fitted:>10}")
    if options.json is not None:
        Path(options.json).write_text(json.dumps(table, indent=1) + "\n")


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.endswith("(bytes)"):
        return f"{value / 1e6:,.2f} MB"
    if name.endswith("(number)"):
        return f"{value:,.0f}"
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.2f} ms"


if __name__ == "__main__":
    sys.exit(run_command(Options, main, __doc__ or ""))
