"""Tokenizers lose nothing, stay the same in a file, and fit the model or are refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, TrainedTokenizer, load_tokenizer
from trainer.errors import ConfigError, DataError

TEXTS = ["the house is small", "das Haus ist klein", "the small house", "ein kleines Haus, „schön“"] * 5
SPECS = {
    "bpe": TrainedTokenizer("bpe", 300),
    "unigram": TrainedTokenizer("unigram", 320),
    "bytes": ByteTokenizer(),
}
TOKENIZERS = {name: spec.prepare(lambda: iter(TEXTS)) for name, spec in SPECS.items()}
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["</s>", " <pad>x", "a\r\n\tb ", "😀 é"])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts)
def test_decoding_gives_back_every_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_batch([ids, [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]]) == [text, text]
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id}
    assert not special & set(ids) and all(id < tokenizer.vocab_size for id in ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_tokenizer_is_the_same_one(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert loaded.decode(loaded.encode_batch(["</s>ü"])[0]) == "</s>ü"
    assert loaded.sha256 == tokenizer.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert Tokenizer.from_json(tokenizer.to_json()).sha256 == tokenizer.sha256
    assert FileTokenizer(str(tmp_path)).prepare(lambda: iter(())).sha256 == tokenizer.sha256


def test_training_learns_words_within_its_budget() -> None:
    for name in ("bpe", "unigram"):
        assert TOKENIZERS[name].vocab_size <= 320
        assert len(TOKENIZERS[name].encode_batch(["das Haus"])[0]) < len("das Haus")
    assert TOKENIZERS["bytes"].vocab_size == 260
    large = TrainedTokenizer("bpe", 100_000).prepare(lambda: iter(TEXTS))
    assert large.vocab_size < 1000  # the corpus has no more to give


def test_lowercase_and_max_records_are_kept_to() -> None:
    lower = TrainedTokenizer("bpe", 300, lowercase=True).prepare(lambda: iter(TEXTS))
    assert lower.decode(lower.encode_batch(["Das HAUS"])[0]) == "das haus"
    assert TrainedTokenizer("bpe", 300, max_records=0).prepare(lambda: iter(TEXTS)).vocab_size == 260


def test_ids_do_not_change_with_the_machine() -> None:
    again = TrainedTokenizer("bpe", 300).prepare(lambda: iter(TEXTS))
    assert again.sha256 == TOKENIZERS["bpe"].sha256
    assert (again.pad_id, again.bos_id, again.eos_id, again.unk_id) == (0, 1, 2, 3)


def test_further_special_tokens_are_in_no_text_and_change_nothing_else() -> None:
    for spec in (TrainedTokenizer("bpe", 301, special_tokens=["<mask>"]), ByteTokenizer(261, ["<mask>"])):
        tokenizer = spec.prepare(lambda: iter(TEXTS))
        assert tokenizer.mask_id is not None and tokenizer.token_of(tokenizer.mask_id) == "<mask>"
        (ids,) = tokenizer.encode_batch(["a <mask> b"])
        assert tokenizer.mask_id not in ids and tokenizer.decode(ids) == "a <mask> b"
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert all(tokenizer.mask_id is None for tokenizer in TOKENIZERS.values())
    with pytest.raises(ConfigError, match=r"tokenizer.special_tokens: <s> would be there twice"):
        TrainedTokenizer("bpe", 300, special_tokens=["<s>"])


def test_others_may_let_it_add_the_ends() -> None:
    ours = TOKENIZERS["bpe"]
    theirs = tokenizers.Tokenizer.from_str(ours.between_ends().to_json())
    (first, second) = ours.encode_batch(["one", "two"])
    pair = theirs.encode("one", "two")
    assert pair.ids == [1, *first, 2, *second, 2]
    assert pair.type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert ours.between_ends().between_ends().to_json() == ours.between_ends().to_json()


def test_vocabularies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    TOKENIZERS["bytes"].save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"has 260 entries, tokenizer.vocab_size=259"):
        FileTokenizer(str(tmp_path / "tokenizer.json"), vocab_size=259).prepare(lambda: iter(()))
    assert FileTokenizer(str(tmp_path / "tokenizer.json"), vocab_size=260).prepare(lambda: iter(())).vocab_size == 260
    for spec in (ByteTokenizer, lambda size: TrainedTokenizer("unigram", size)):
        with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=259 is too small"):
            spec(259)
    with pytest.raises(ConfigError, match=r"tokenizer.kind=words"):
        TrainedTokenizer("words")  # type: ignore[arg-type]


def test_files_that_are_no_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken.json: This is not a tokenizer.json"):
        FileTokenizer(str(tmp_path / "broken.json")).prepare(lambda: iter(()))
    with pytest.raises(DataError, match=r"absent.json: cannot be read"):
        FileTokenizer(str(tmp_path / "absent.json")).prepare(lambda: iter(()))
    with pytest.raises(DataError, match=r"tokenizer.path=no/such-model: neither a file"):
        FileTokenizer("no/such-model").prepare(lambda: iter(()))


def test_a_fork_after_encoding_is_silent() -> None:
    code = (
        "import os; from trainer.data.tokenizer import ByteTokenizer\n"
        "tokenizer = ByteTokenizer().prepare(lambda: iter(()))\n"
        "tokenizer.encode_batch(['some text'] * 1000)\n"
        "child = os.fork()\n"
        "os._exit(0) if child == 0 else os.waitpid(child, 0)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert finished.stderr == ""


SPECIAL_SPECS = {
    "bpe": TrainedTokenizer("bpe", 400, special_tokens=["<mask>", "<extra_id_{0..2}>"]),
    "unigram": TrainedTokenizer("unigram", 400, special_tokens=["<mask>", "<extra_id_{0..2}>"]),
    "bytes": ByteTokenizer(300, special_tokens=["<mask>", "<extra_id_{0..2}>"]),
}


@pytest.mark.parametrize("name", SPECIAL_SPECS)
def test_special_tokens_are_found_by_name_and_never_in_a_text(name: str, tmp_path: Path) -> None:
    tokenizer = SPECIAL_SPECS[name].prepare(lambda: iter(TEXTS))
    tokens = ["<mask>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    ids = [tokenizer.id_of(token) for token in tokens]
    assert [tokenizer.token_of(id) for id in ids if id is not None] == tokens and len({*ids, *range(4)}) == 8
    (text,) = tokenizer.encode_batch(["a <mask> here"])
    assert not set(ids) & set(text)
    assert tokenizer.decode([ids[0], *text, ids[2]]) == "a <mask> here"
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").id_of("<extra_id_2>") == ids[3]
    assert tokenizer.id_of("<extra_id_3>") is None


def test_a_file_gets_the_special_tokens_it_lacks_and_without_any_it_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    SPECIAL_SPECS["bytes"].prepare(lambda: iter(())).save(path)
    same = FileTokenizer(str(path)).prepare(lambda: iter(()))
    assert same.to_json() == path.read_text()
    more = FileTokenizer(str(path), special_tokens=["<mask>", "<user>"]).prepare(lambda: iter(()))
    assert (more.id_of("<mask>"), more.id_of("<user>"), more.vocab_size) == (260, 264, 265)
    with pytest.raises(ConfigError, match=r"has 265 entries, tokenizer.vocab_size=264"):
        FileTokenizer(str(path), 264, ["<user>"]).prepare(lambda: iter(()))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["<a>", "<a>"], "<a> would be there twice"),
        (["<s>"], "<s> would be there twice"),
        ([" "], "' ' is no name"),
        ([3], "3 is no name"),
        (["<x{0..99}>"], r"256 bytes and 104 special tokens need 360"),
    ],
)
def test_special_tokens_that_cannot_be_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ByteTokenizer(300, special_tokens=names)
