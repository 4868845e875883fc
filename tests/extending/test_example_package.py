"""docs/extend.md: a package outside our tree brings a model, a task, a source, a sink and a schedule, and trains."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).with_name("example_package")
SEARCH_PATH = "hydra.searchpath=[pkg://curve_fitting.configs]"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed, by pip, for PYTHONPATH."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    command = [*pip, "--no-build-isolation", "--target", str(target), str(PACKAGE)]
    subprocess.run(command, check=True, timeout=120)
    return target


@pytest.fixture
def points(tmp_path: Path) -> Path:
    """A database of points of a cubic, a few without a y."""
    path = tmp_path / "points.db"
    generator = np.random.default_rng(0)
    with sqlite3.connect(path) as database:
        for split, count in (("train", 1000), ("validation", 100), ("test", 100)):
            database.execute(f"CREATE TABLE {split} (x REAL, y REAL)")
            xs = generator.uniform(-1, 1, count)
            rows = [(float(x), float(1 - 2 * x + 3 * x**3) if index % 200 else None) for index, x in enumerate(xs, 1)]
            database.executemany(f"INSERT INTO {split} VALUES (?, ?)", rows)
    return path


def train(site: Path, folder: Path, arguments: Sequence[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "trainer", SEARCH_PATH, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=200)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "runs/curve/metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_package_outside_trains(site: Path, points: Path, tmp_path: Path) -> None:
    done = train(site, tmp_path, ["experiment=curve", f"data.source.path={points}"])
    assert done.returncode == 0, done.stderr
    assert re.search(r"data +curve_fitting\.source\.SqliteSource\n", done.stdout)
    run = tmp_path / "runs/curve"
    assert json.loads((run / "evaluation.json").read_text())["eval/accuracy"] > 0.95
    quarantine = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert len(quarantine) == 5 and "column 'y' holds None, not a number" in quarantine[0]["reason"]
    assert (run / "losses.txt").read_text().splitlines()[0].startswith("1 ")
    rates = {row["lr"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "lr" in row}
    assert {0.1, 0.05, 0.025, 0.0125} <= rates


@pytest.mark.dist
def test_its_curve_does_not_depend_on_the_split(site: Path, points: Path, tmp_path: Path) -> None:
    curves = []
    for ranks, engine in ((1, "plain"), (2, "zero2")):
        folder = tmp_path / engine
        folder.mkdir()
        words = [f"data.source.path={points}", f"engine={engine}", "steps=20", "log.every=1", "eval.final_split=none"]
        done = train(site, folder, ["experiment=curve", *words], ranks)
        assert done.returncode == 0, done.stderr
        curves.append(losses(folder))
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)


def test_its_code_runs_only_when_allowed(site: Path, points: Path, tmp_path: Path) -> None:
    done = train(site, tmp_path, ["experiment=curve", f"data.source.path={points}", "allow_targets=[]"])
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert "data.source._target_=curve_fitting.source.SqliteSource is code outside trainer" in done.stderr


def test_a_missing_database_is_named(site: Path, tmp_path: Path) -> None:
    done = train(site, tmp_path, ["experiment=curve", "data.source.path=nowhere.db"])
    assert done.returncode == 2 and "error: data.source.path=nowhere.db: there is no such file." in done.stderr
