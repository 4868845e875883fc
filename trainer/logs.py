"""The trainer's own messages: rank 0's warnings on standard error, every rank's in its own file of the run
directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class _File(logging.FileHandler):
    """A rank's own file; where its disk is full, the messages are lost and the run is not."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: the console has the warnings of rank 0."""


@contextmanager
def run_log(rank: int) -> Iterator[Callable[[Path], None]]:
    """Take in the messages of the package `trainer` until the run is over; call what it yields to add a file for
    them."""
    logger = logging.getLogger("trainer")
    console: logging.Handler = logging.StreamHandler() if rank == 0 else logging.NullHandler()
    console.setLevel(logging.WARNING)
    handlers = [console]
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(console)

    def add_file(path: Path) -> None:
        file = _File(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
        logger.addHandler(file)

    try:
        yield add_file
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
