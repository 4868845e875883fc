"""When copies of checkpoints are made and used: a thread sends them while training goes on, and a run that finds a
newer one than its own begins with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

from trainer import distributed
from trainer.checkpoint import is_step_name, kept
from trainer.checkpoint.load import Checkpoint, newest
from trainer.checkpoint.remote import RemoteRun
from trainer.checkpoint.save import best_of, point
from trainer.config import CheckpointConfig, Config
from trainer.errors import CheckpointError
from trainer.guards import watchdog
from trainer.run_directory import Copy, RunDirectory

_log = logging.getLogger(__name__)


def begin(config: Config, directory: RunDirectory) -> Checkpoint | None:
    """On rank 0: the checkpoint to go on from, None for a new run; one on remote storage that is newer is fetched.

    Raises what `RunDirectory.check` and `newest` raise, and CheckpointError where remote storage cannot be asked and
    there is no checkpoint here: starting from zero in silence would throw a run away.
    """
    if config.checkpoint.remote is None:
        directory.check(config)
        return newest(directory.checkpoints, watchdog.progress)
    remote = RemoteRun(config)
    copies = remote.whole()
    try:
        written, first = remote.config(), next(copies, None)
    except OSError as error:
        words = f"checkpoint.remote: {remote.url} cannot be asked for checkpoints: {error}"
        if not any(directory.checkpoints.glob("step_*")):
            cure = "start again when it answers, or set checkpoint.remote=null to begin without"
            raise CheckpointError(f"{words}; {cure}.") from error
        _log.warning("%s; going on from %s.", words, directory.checkpoints)
        directory.check(config)
        return newest(directory.checkpoints, watchdog.progress)
    directory.check(config, Copy(remote.url, written, first is not None))
    if first is None:
        return newest(directory.checkpoints, watchdog.progress)
    try:
        local, damage = newest(directory.checkpoints, watchdog.progress), None
    except CheckpointError as error:
        local, damage = None, error
    try:
        return _newer(local, damage, remote, first, copies, directory)
    except OSError as error:
        raise CheckpointError(
            f"{remote.url} has a newer checkpoint than {directory.path}, and it cannot be fetched: {error}; start again"
            " when that is mended, or set checkpoint.remote=null to go on without it."
        ) from error


def _newer(
    local: Checkpoint | None,
    damage: CheckpointError | None,
    remote: RemoteRun,
    first: tuple[str, dict[str, Any]],
    others: Iterator[tuple[str, dict[str, Any]]],
    directory: RunDirectory,
) -> Checkpoint | None:
    """The newest of `local` and of the copies that is as its manifest says. `damage`: why there is no local one."""
    found: tuple[str, dict[str, Any]] | None = first
    while found is not None and (local is None or found[0] > local.folder.name):
        try:
            checkpoint = remote.fetch(*found, directory.checkpoints)
        except CheckpointError as error:
            damage = error
            _log.warning("%s/checkpoints/%s: %s Looking for an older one.", remote.url, found[0], error)
            found = next(others, None)
            continue
        remote.fetch_run_files(directory.path, missing_only=False)
        point(directory.checkpoints, "latest", checkpoint.folder.name)
        return checkpoint
    if local is None:
        raise CheckpointError(f"No whole checkpoint is left in {remote.url} or {directory.path}. {damage}")
    remote.fetch_run_files(directory.path, missing_only=True)
    return local


def make_copier(config: Config, directory: RunDirectory) -> Copier | None:
    """On rank 0 of a run with `checkpoint.remote`: its copier, which sends what is here and not there yet."""
    if config.checkpoint.remote is None or distributed.rank() != 0:
        return None
    copier = Copier(RemoteRun(config), directory, config.checkpoint)
    copier.offer()
    return copier


class Copier:
    """Sends committed checkpoints to remote storage; made on rank 0, whose main thread calls it.

    The newest goes first, then older ones that stay for good. What fails is told and tried again with the next offer.
    """

    def __init__(self, remote: RemoteRun, directory: RunDirectory, checkpoint: CheckpointConfig) -> None:
        self._remote = remote
        self._directory = directory.path
        self._root = directory.checkpoints
        self._checkpoint = checkpoint
        self._lock = threading.Condition()
        self._wanted: frozenset[str] | None = None
        self._under_way: frozenset[str] | None = None
        self._thread: threading.Thread | None = None
        self._there: set[str] = set()
        self._sent: dict[str, set[str]] = {}
        self._news: list[str] = []
        self._outcome: str | None = None

    def offer(self) -> None:
        """Let the checkpoints that are kept here now be there too."""
        names = [path.name for path in self._root.glob("step_*") if is_step_name(path.name)]
        wanted = kept(names, self._checkpoint.keep, self._checkpoint.keep_every, best_of(self._root))
        if not wanted:
            return
        with self._lock:
            self._wanted = frozenset(wanted)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
                self._thread.start()

    @property
    def spared(self) -> frozenset[str]:
        """What must not be deleted yet, for it is to be sent."""
        with self._lock:
            return (self._wanted or frozenset()) | (self._under_way or frozenset())

    def wait(self, seconds: float) -> int | None:
        """Wait so long for all that was offered to be sent or to fail: None, or a number that grows as it is sent."""
        with self._lock:
            over = self._lock.wait_for(lambda: self._thread is None, seconds)
        return None if over else int(self._remote.num_bytes.value)

    def take_news(self, last: bool) -> list[str]:
        """What went wrong since the last call; `last`: how it ended, in any case."""
        with self._lock:
            news, self._news = self._news, []
            if last and self._outcome is not None and self._outcome not in news:
                news.append(self._outcome)
        return news

    def _run(self) -> None:
        """In the thread."""
        while (names := self._take()) is not None:
            try:
                self._send(names)
                self._outcome = f"the checkpoints up to {max(names)} are also in {self._remote.url}"
            except Exception as error:  # whatever it is, training goes on
                self._outcome = f"{max(names)} was not copied to {self._remote.url}: {error}"
                _log.warning("%s; tried again with the next checkpoint", self._outcome)
                with self._lock:
                    self._news.append(self._outcome)

    def _take(self) -> frozenset[str] | None:
        with self._lock:
            self._under_way, self._wanted = self._wanted, None
            if self._under_way is None:
                self._thread = None
                self._lock.notify_all()
            return self._under_way

    def _send(self, names: frozenset[str]) -> None:
        newest_name = max(names)
        for name in sorted(names, reverse=True):
            if name != newest_name and self._wanted is not None:
                break  # what is newer goes first; this one is offered again
            if name in self._there:
                continue
            folder = self._root / name
            sent = self._sent.setdefault(name, set())
            if sent or not self._remote.holds(name, folder):
                self._remote.send_run_files(self._directory)  # first: a whole checkpoint is never without them
                self._remote.send(name, folder, sent)
            self._there.add(name)
            self._sent.pop(name)
        self._remote.point("latest", newest_name)
        if (best := best_of(self._root)) is not None:
            self._remote.point("best", best)
        self._remote.prune(newest_name, self._checkpoint, best)
