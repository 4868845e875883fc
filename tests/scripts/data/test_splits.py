"""Normal forms and leak-free splits (scripts/data/corpora.py)."""

import gzip
from pathlib import Path

from corpora import fold, normalise, read_jsonl_gz, split_name, split_pairs, unit_hash, write_jsonl_gz
from hypothesis import given
from hypothesis import strategies as st

WORDS = st.sampled_from(["Turn", "turn", "on", "the", "lamp", "Lamp", "3", "42", "!", "(off)"])
SENTENCES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
PAIRS = st.lists(st.tuples(SENTENCES, SENTENCES).map(lambda pair: {"en": pair[0], "de": pair[1]}), max_size=40)


def test_normal_forms() -> None:
    assert normalise("  Turn\tON  ") == "turn on"
    assert fold("Port 12: on!") == fold("port 7 On") == "port 0 on"
    assert fold("turn on") != fold("turn off")


def test_hashes_do_not_change_between_machines() -> None:
    assert unit_hash("shardwright") == 0.30405667126016045
    assert split_name("anything", 0.0, 1.0) == "test"
    assert split_name("anything", 1.0, 0.0) == "validation"
    assert split_name("anything", 0.0, 0.0) == "train"


@given(PAIRS)
def test_no_held_out_sentence_is_trained_on(pairs: list[dict[str, str]]) -> None:
    splits = split_pairs(pairs, ("en", "de"), lambda _: (0.3, 0.3))
    sides = {name: {normalise(text) for pair in rows for text in pair.values()} for name, rows in splits.items()}
    assert sides["test"].isdisjoint(sides["train"] | sides["validation"])
    assert sides["validation"].isdisjoint(sides["train"])
    kept = [pair for rows in splits.values() for pair in rows]
    assert len(kept) <= len(pairs) and all(pair in pairs for pair in kept)


@given(PAIRS)
def test_test_split_is_not_thinned_out(pairs: list[dict[str, str]]) -> None:
    expected = [pair for pair in pairs if split_name(fold(pair["en"]), 0.3, 0.3) == "test"]
    assert split_pairs(pairs, ("en", "de"), lambda _: (0.3, 0.3))["test"] == expected


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    records = [{"en": "Grüße", "n": 1}, {"en": "two", "n": 2}]
    write_jsonl_gz(tmp_path / "a.jsonl.gz", records)
    write_jsonl_gz(tmp_path / "elsewhere" / "b.jsonl.gz", records)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "elsewhere" / "b.jsonl.gz").read_bytes()
    assert list(read_jsonl_gz(tmp_path / "a.jsonl.gz")) == records
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode().count("\n") == 2
