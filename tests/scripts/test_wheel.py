"""An installed wheel works in an empty folder: configs and corpora travel with it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout and unpacked: a folder for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=120)
    (wheel,) = folder.glob("shardwright-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_holds_the_packages_configs_corpora_and_licences(site: Path) -> None:
    configs = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert {
        path.relative_to(site / "trainer/configs") for path in (site / "trainer/configs").rglob("*.yaml")
    } == configs
    corpora = site / "trainer/data/corpora"
    assert (corpora / "homeassistant_en_de/train.jsonl.gz").is_file()
    assert (corpora / "homeassistant_en_de/LICENSE").is_file()
    assert (corpora / "digits/test.parquet").is_file()
    assert list(site.glob("shardwright-*.dist-info/licenses/LICENSE"))
    assert not (site / "tests").exists() and not (site / "scripts").exists()


def test_the_command_line_works_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "--cfg", "job", "experiment=quickstart"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "name: quickstart" in done.stdout
    assert list(tmp_path.iterdir()) == []
