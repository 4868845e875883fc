"""The documentation builds as a site, strictly: no broken link, no page that nobody finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.config import Config, config_to_dict
from trainer.wording import flatten

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if page not in navigation} == set()


def test_the_reference_has_every_fact_and_choice(site: Path) -> None:
    page = (site / "reference/keys/index.html").read_text()
    facts = flatten(config_to_dict(Config(name="x", steps=1, model={}, task={}, data={}, optimizer={}, schedule={})))
    parts = ("model", "task", "data", "tokenizer", "optimizer", "schedule", "logging", "engine", "checkpoint")
    missing = [key for key, _ in facts if key.partition(".")[0] not in parts and f"<code>{key}</code>" not in page]
    assert missing == []
    choices = (ROOT / "configs/model").glob("*.yaml")
    assert all(f"model={path.stem}" in page for path in choices)


def test_contracts_come_from_the_docstrings(site: Path) -> None:
    page = (site / "reference/contracts/index.html").read_text()
    for name in ("trainer.models", "trainer.tasks.Task", "trainer.data.sources.Source", "trainer.metrics.Sink"):
        assert name in page


def test_the_site_asks_no_other_host(site: Path) -> None:
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text().partition("hooks:")[0])["theme"]["font"] is False
    assert "fonts.googleapis.com" not in (site / "index.html").read_text()
