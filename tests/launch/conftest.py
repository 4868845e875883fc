"""Fixtures of the launchers: a cluster of Slurm's, and `launch` in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.slurm_cluster import Cluster, slurm_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm, or a skip with the reason."""
    with slurm_cluster() as running:
        yield running
