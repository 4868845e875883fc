"""Where in a step this process is: said by whoever does the work, heard by the watchdog and by the profile.

The sections of a step, in their order: data, agree, forward and backward (of each micro-batch), reduce (where it is not
part of backward, as DeepSpeed has it), optimizer, commit, log, evaluate, save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int | None], None]
"""Gets the name of the section that begins, and its step; None before the first."""

_step: int | None = None
_listeners: tuple[Listener, ...] = ()


def enter(name: str, step: int | None = None) -> None:
    """This process now does `name`, for `step` (None: the same as before), or begins on it anew: what comes in pieces
    may take long as a whole."""
    global _step
    if step is not None:
        _step = step
    for listener in _listeners:
        listener(name, _step)


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """While it lasts, `listener` hears of every section that begins. The first listener finds no step yet."""
    global _step, _listeners
    if not _listeners:
        _step = None
    _listeners = (*_listeners, listener)
    try:
        yield
    finally:
        _listeners = tuple(one for one in _listeners if one is not listener)
