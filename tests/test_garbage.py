"""The garbage collector runs at the steps that all ranks choose, and is as before after a run."""

import gc
import weakref

from trainer import garbage


class _Knot:
    """An object in a cycle, which only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_cycles_are_freed_at_the_chosen_steps_alone() -> None:
    with garbage.collected_between_steps():
        assert not gc.isenabled()
        knot = _Knot()
        seen = weakref.ref(knot)
        del knot
        garbage.collect(99)
        assert seen() is not None
        garbage.collect(100)
        assert seen() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
