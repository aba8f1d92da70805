"""One Slurm cluster for all tests here; none of them runs where Slurm is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_unavailable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    with Cluster().running() as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster without any job of an earlier test."""
    yield session_cluster
    session_cluster.cancel_all()


@pytest.fixture
def checkout() -> Path:
    """The folder that holds slurm/ and pipeline/."""
    return ROOT
