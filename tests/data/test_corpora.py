"""The packaged corpora: what they promise in their README files holds for the files themselves."""

import hashlib
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpora import CORPORA, SPLITS, normalise, read_jsonl_gz

MEGABYTE = 2**20
ROWS = {
    "homeassistant_en_de": {"train": 22198, "validation": 510, "test": 985},
    "digits": {"train": 1259, "validation": 179, "test": 359},
    "python_docs": {"train": 11852, "validation": 344, "test": 820},
}


def read_rows(name: str, split: str) -> list[dict[str, str]]:
    return list(read_jsonl_gz(CORPORA / name / f"{split}.jsonl.gz"))


@pytest.mark.parametrize("name", ROWS)
def test_licence_and_provenance_lie_beside_the_data(name: str) -> None:
    folder = CORPORA / name
    assert (folder / "LICENSE").stat().st_size > 1000
    assert "icensed under" in (folder / "NOTICE").read_text() and "Changes" in (folder / "NOTICE").read_text().title()
    readme = (folder / "README.md").read_text()
    for count in ROWS[name].values():
        assert f"{count:,}" in readme


@pytest.mark.parametrize("name", ROWS)
def test_files_are_those_that_were_built(name: str) -> None:
    lines = (CORPORA / name / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == len(SPLITS)
    for line in lines:
        digest, file = re.split(r"\s+", line)
        assert hashlib.sha256((CORPORA / name / file).read_bytes()).hexdigest() == digest


def test_all_corpora_are_small_enough_to_clone() -> None:
    assert sum(path.stat().st_size for path in CORPORA.rglob("*") if path.is_file()) < 15 * MEGABYTE


def test_translation_splits_share_no_sentence() -> None:
    sides = {split: set[str]() for split in SPLITS}
    for split in SPLITS:
        rows = read_rows("homeassistant_en_de", split)
        assert len(rows) == ROWS["homeassistant_en_de"][split]
        assert all(row.keys() == {"en", "de"} and row["en"].strip() and row["de"].strip() for row in rows)
        sides[split] = {normalise(text) for row in rows for text in row.values()}
    assert sides["test"].isdisjoint(sides["train"])
    assert sides["validation"].isdisjoint(sides["train"])
    assert sides["test"].isdisjoint(sides["validation"])


def test_translation_has_to_be_learnt() -> None:
    import sacrebleu

    rows = read_rows("homeassistant_en_de", "test")
    score = sacrebleu.corpus_bleu([row["en"] for row in rows], [[row["de"] for row in rows]]).score
    assert 7 < score < 11  # copying names and placeholders is worth something, but not much


def test_digits_are_scaled_stratified_and_distinct() -> None:
    images: list[tuple[float, ...]] = []
    for split, count in ROWS["digits"].items():
        table = pq.read_table(CORPORA / "digits" / f"{split}.parquet").to_pydict()
        assert len(table["label"]) == len(table["pixels"]) == count
        shares = [table["label"].count(digit) / count for digit in range(10)]
        assert min(shares) > 0.09 and max(shares) < 0.11
        images += [tuple(pixels) for pixels in table["pixels"]]
    assert len(set(images)) == len(images) == 1797
    assert {len(image) for image in images} == {64}
    assert min(map(min, images)) == 0.0 and max(map(max, images)) == 1.0


def test_documentation_splits_share_no_file_and_no_passage() -> None:
    sources: list[set[str]] = []
    texts: list[set[str]] = []
    for split, count in ROWS["python_docs"].items():
        rows = read_rows("python_docs", split)
        assert len(rows) == count
        assert max(len(row["text"]) for row in rows) <= 1000
        sources.append({row["source"] for row in rows})
        texts.append({normalise(row["text"]) for row in rows})
    for parts in (sources, texts):
        assert len(set.union(*parts)) == sum(map(len, parts))


def test_no_corpus_is_without_a_test() -> None:
    assert {path.name for path in Path(CORPORA).iterdir() if path.is_dir()} == set(ROWS)
