"""Masters and optimizer states on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.nvme_sources import copy_sources
from tests.warm import run_warm
from trainer.engine.nvme import claim_folder
from trainer.errors import SetupError


def test_a_folder_that_takes_no_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"engine\.nvme_path: .*file/run takes no files"):
        claim_folder(f"{tmp_path}/file/run", 0)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_learns_saves_and_loads_as_in_memory(trainer_env, tmp_path, pytestconfig):
    """Two ranks, to the last bit; see `nvme_on_ranks.py`. DeepSpeed compiles its reader and writer at first use."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio's headers or a compiler are missing")
    cache = getattr(pytestconfig, "cache", None)
    sources = Path(cache.mkdir("nvme")) if cache else tmp_path / "sources"
    copy_sources(sources)
    env = {**trainer_env, "TORCH_EXTENSIONS_DIR": str(sources / "built")}
    done = run_warm("tests.engine.nvme_on_ranks", [str(tmp_path), str(sources)], 2, ROOT, env, timeout=1200)
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr[-4000:]
    assert not list((tmp_path / "disk").rglob("*.swp"))
