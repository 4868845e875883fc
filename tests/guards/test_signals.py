"""What asks for a stop, and what leaves at once."""

from __future__ import annotations

import os
import signal

import pytest

from trainer.guards import signals


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ours = Clock()
    monkeypatch.setattr(signals, "time", ours)
    return ours


@pytest.mark.parametrize("first", signals.STOP_SIGNALS)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_of_one_moment_are_one_request_and_a_later_one_leaves(
    clock: Clock, first: signal.Signals, second: signal.Signals
) -> None:
    before = signal.getsignal(second)
    with signals.listening() as request:
        os.kill(os.getpid(), first)
        assert request.name == first.name
        clock.now += signals.ONE_REQUEST_SECONDS
        os.kill(os.getpid(), second)
        assert request.name == first.name
        clock.now += 0.1
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), second)
        assert left.value.code == 128 + second
    assert signal.getsignal(second) is before
