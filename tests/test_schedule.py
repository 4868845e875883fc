"""Learning rates as a user sees them: by step, independent of ranks and accumulation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.schedule import WSD, Constant, Cosine, InverseSquareRoot, Linear

ALL = [Constant, Linear, Cosine, InverseSquareRoot, WSD]


@pytest.mark.parametrize("schedule", ALL)
def test_warmup_rises_linearly_and_learns_from_the_first_step(schedule):
    factors = [schedule(total=100, warmup=10).factor(step) for step in range(11)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ALL)
@given(warmup=st.integers(0, 50), step=st.integers(0, 300))
def test_factor_stays_between_zero_and_one(schedule, warmup, step):
    assert 0.0 <= schedule(total=200, warmup=warmup).factor(step) <= 1.0


def test_known_points():
    assert Linear(total=110, warmup=10).factor(60) == pytest.approx(0.5)
    assert Cosine(total=110, warmup=10, final=0.1).factor(60) == pytest.approx(0.55)
    assert Cosine(total=110, warmup=10, final=0.1).factor(110) == pytest.approx(0.1)
    assert InverseSquareRoot(total=1000, warmup=100).factor(400) == pytest.approx(0.5)
    assert WSD(total=100, decay=0.2).factor(79) == 1.0
    assert WSD(total=100, decay=0.2).factor(90) == pytest.approx(0.5)


def test_tokens_as_unit_warm_up_from_above_zero():
    schedule = Linear(total=1_000_000, warmup=100_000, unit="tokens")
    assert 0 < schedule.factor(0) < 0.01
    assert schedule.factor(50_000) == pytest.approx(0.501)


def test_warmup_longer_than_the_run_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"schedule.warmup=200 steps.*the 100 of the run"):
        Cosine(total=100, warmup=200)
