"""What a run is expected to take, and the warning where that is more than there is."""

from __future__ import annotations

import pytest

from trainer import expectation
from trainer.composition import compose
from trainer.config import to_config
from trainer.host import memory_limit
from trainer.summary import dry_run


def expected(*words: str, ranks: int = 1) -> expectation.Expectation | None:
    return expectation.expect(to_config(compose(["experiment=lm_small", *words])), ranks)


def test_a_line_tells_the_peak_and_its_largest_parts() -> None:
    found = expected()
    assert found is not None and found.warning is None and found.step_seconds is None
    assert found.told.startswith("peak of a rank ") and "activations" in found.told
    text = dry_run(to_config(compose(["experiment=lm_small"])), found.told)
    assert f"predicted      {found.told}" in text
    assert "measured 1.00 GiB" in found.beside(2**30, 1.0)


def test_more_samples_at_once_take_more() -> None:
    small, large = expected("batch.micro_size=1"), expected("batch.micro_size=16")
    assert small is not None and large is not None and large.memory_bytes > 1.2 * small.memory_bytes


def test_what_does_not_fit_is_told_with_the_smallest_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, half = expected("batch.micro_size=16"), expected("batch.micro_size=8")
    assert whole is not None and half is not None
    monkeypatch.setattr(expectation, "memory_limit", lambda: (whole.memory_bytes + half.memory_bytes) / 2)
    found = expected("batch.micro_size=16")
    assert found is not None and found.warning is not None
    assert "will probably not fit" in found.warning and "batch.micro_size=8 should fit" in found.warning
    monkeypatch.setattr(expectation, "memory_limit", lambda: 2**28)
    found = expected()
    assert found is not None and found.warning is not None and "use more ranks, or a smaller model" in found.warning


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one = expected("batch.micro_size=1")
    assert one is not None
    monkeypatch.setattr(expectation, "memory_limit", lambda: 2 * one.memory_bytes)
    assert expected("batch.micro_size=1", ranks=4).warning is None  # type: ignore[union-attr]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert expected("batch.micro_size=1", ranks=4).warning is not None  # type: ignore[union-attr]


def test_nothing_is_predicted_for_models_that_the_formulas_do_not_know() -> None:
    config = to_config(compose(["experiment=digits_mlp"]))
    assert expectation.expect(config, 1) is None


def test_the_memory_of_a_host_is_known() -> None:
    assert 2**28 < memory_limit() < 2**50
