"""The files of a run stay whole, whatever happens while they are written."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from chaos_faults import full
from chaos_job import small_disk

from trainer.composition import compose
from trainer.config import config_from_yaml, to_config
from trainer.errors import ConfigError, SetupError
from trainer.run_directory import RunDirectory


def test_a_start_on_a_full_disk_is_refused_and_spoils_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256 << 10) as mounted:
        if not mounted:
            pytest.skip("not permitted to mount a small disk")
        config = to_config(compose(["experiment=quickstart", f"runs_dir={tmp_path / 'disk'}"]))
        directory = RunDirectory.of(config)
        directory.claim(config, [], {"a": 1}, {}, None)
        directory.status("running", 7, "training")
        before = {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}
        with full(tmp_path / "disk"):
            with pytest.raises(SetupError, match=r"runs_dir=.*No space left on device"):
                directory.claim(config, [], {"a": 2}, {}, None)
            directory.status("failed", 8, "no room")
        assert {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()} == before
        assert config_from_yaml(directory.config) == config


def test_what_a_kill_has_left_is_taken_away(tmp_path: Path) -> None:
    config = to_config(compose(["experiment=quickstart", f"runs_dir={tmp_path}"]))
    directory = RunDirectory.of(config)
    directory.heartbeats.mkdir(parents=True)
    leftovers = [directory.path / ".status.json.host.123.partial", directory.heartbeats / "rank_00003.partial"]
    for leftover in leftovers:
        leftover.write_text("half a")
    directory.claim(config, [], {}, {}, None)
    assert not any(leftover.exists() for leftover in leftovers) and directory.config.exists()


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """An argument that a class got later had its default; another value of it is a difference, as ever."""
    words = ["experiment=quickstart", f"runs_dir={tmp_path}"]
    config = to_config(compose(words))
    directory = RunDirectory.of(config)
    directory.claim(config, [], {}, {}, None)
    text = directory.config.read_text()
    assert "  norm_eps: 1.0e-06\n" in text and "  special_tokens: []\n" in text
    earlier = text.replace("  norm_eps: 1.0e-06\n", "").replace("  special_tokens: []\n", "")
    directory.config.write_text(earlier)
    directory.check(config)
    with pytest.raises(ConfigError, match=r"model.norm_eps: 1e-06 -> 0.5"):
        directory.check(to_config(compose([*words, "model.norm_eps=0.5"])))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_status_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = RunDirectory(tmp_path)
    tmp_path.chmod(0o500)
    with caplog.at_level(logging.WARNING):
        directory.status("running", 1, "training")
    tmp_path.chmod(0o700)
    assert "status.json stays as it is" in caplog.text
