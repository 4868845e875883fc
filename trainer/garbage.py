"""Python's cyclic garbage collector, run between steps that all ranks choose alike.

Left to itself it stops a rank whenever that one has made enough objects, and the others wait for it; the many samples
at hand make each of its passes long.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 100
"""Steps from one pass to the next."""


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """No pass but those of `collect`; what exists already is looked through no more."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect(step: int) -> None:
    """Make a pass if it is due after `step`."""
    if step % _EVERY == 0:
        gc.collect()
