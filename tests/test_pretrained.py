"""init_from=hf:FOLDER: runs begin with the loss that transformers has, end as the folder they began from where nothing
is learnt, hold one parameter at a time, and refuse folders that do not fit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file

from tests.formats import test_bart, test_t5  # noqa: E402
from trainer.build import build  # noqa: E402
from trainer.composition import compose  # noqa: E402
from trainer.config import to_config  # noqa: E402
from trainer.data.tokenizer import ByteTokenizer, TrainedTokenizer  # noqa: E402
from trainer.engine.base import Fragment  # noqa: E402
from trainer.errors import CheckpointError, ConfigError  # noqa: E402
from trainer.export.__main__ import main as export  # noqa: E402
from trainer.formats.catalogue import part_of  # noqa: E402
from trainer.initial import initialise  # noqa: E402
from trainer.main import run  # noqa: E402
from trainer.pretrained import open_weights  # noqa: E402

PAIRS = [("a light", "ein Licht"), ("the door", "die T\u00fcr"), ("on", "an"), ("switch it off", "schalte es aus")]
NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0", "model.activation_dropout=0")
SHAPE = ("model.d_model=32", "model.num_heads=4", "model.d_ff=40", "model.encoder_layers=1", "model.decoder_layers=2")
MODELS = {
    "t5": ("model=t5", *SHAPE, *NO_DROPOUT, "model.d_kv=8", "model.relative_max_distance=64"),
    "marian": ("model=marian", *SHAPE, *NO_DROPOUT),
}
EOS, PAD = 2, 0


def make_folder(kind: str, folder: Path) -> torch.nn.Module:
    """A model of transformers in a folder, with the tokenizer of bytes; targets begin with padding."""
    if kind == "t5":
        theirs = test_t5.make(vocab_size=260)
    else:
        options = {"activation_function": "swish", "scale_embedding": True, "decoder_start_token_id": PAD}
        theirs = test_bart.make("marian", vocab_size=260, **options)
    theirs.save_pretrained(folder, max_shard_size="50KB")
    ByteTokenizer().prepare(lambda: iter(())).save(folder / "tokenizer.json")
    return theirs


def words_of(kind: str, folder: Path, *more: str) -> list[str]:
    """A run of two steps on all pairs at once, beginning with the folder's weights."""
    data = folder.parent / "pairs"
    data.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = (json.dumps({"en": source, "de": target}) + "\n" for source, target in PAIRS)
        (data / f"{split}.jsonl").write_text("".join(rows))
    return [
        *MODELS[kind], f"init_from=hf:{folder}", "tokenizer=file", f"tokenizer.path={folder}/tokenizer.json",
        "tokenizer.vocab_size=260", 'task.start_token="<pad>"', "task.label_smoothing=0", "task.beam_size=1",
        "data=files", f"data.path={data}", "name=run", "steps=2", "precision=fp32", f"batch.global_size={len(PAIRS)}",
        "schedule=constant", "log.every=1", "eval.final_split=none", "checkpoint=end", "logging=[]", *more,
    ]  # fmt: skip


def here(words: list[str], runs_dir: Path) -> None:
    """The run, in this process."""
    overrides = [*words, f"runs_dir={runs_dir}"]
    assert run(to_config(compose(overrides)), overrides) == 0


def first_loss(runs_dir: Path) -> float:
    lines = (runs_dir / "run" / "metrics.jsonl").read_text().splitlines()
    return next(row["loss"] for row in map(json.loads, lines) if "loss" in row)


def batch_of_theirs() -> dict[str, torch.Tensor]:
    """PAIRS as transformers takes them: bytes and the end of the text, labels of -100 behind it."""

    def rows(texts, padding):
        ids = [[*TOKENIZER.encode_batch([text])[0], EOS] for text in texts]
        return torch.tensor([row + [padding] * (max(map(len, ids)) - len(row)) for row in ids])

    sources, labels = rows([source for source, _ in PAIRS], PAD), rows([target for _, target in PAIRS], -100)
    return {"input_ids": sources, "attention_mask": (sources != PAD).long(), "labels": labels}


TOKENIZER = ByteTokenizer().prepare(lambda: iter(()))


def test_a_run_begins_with_the_loss_that_transformers_has(tmp_path: Path) -> None:
    theirs = make_folder("marian", tmp_path / "folder")
    here(words_of("marian", tmp_path / "folder", "optimizer.lr=1e-3"), tmp_path / "runs")
    with torch.inference_mode():
        expected = float(theirs(**batch_of_theirs()).loss)
    assert first_loss(tmp_path / "runs") == pytest.approx(expected, rel=1e-5)

    part = part_of(theirs.config.to_dict())
    shapes = {name: parameter.shape for name, parameter in build(part, "model").named_parameters()}
    again = open_weights("run:run", str(tmp_path / "runs"), part, shapes, TOKENIZER).values("embedding.weight")
    learnt = (again - theirs.model.shared.weight.detach().flatten()).abs().max()
    assert 1e-4 < learnt < 1e-2  # what two steps of AdamW have changed
    other = TrainedTokenizer(vocab_size=300).prepare(lambda: iter(["the light"] * 9))
    with pytest.raises(ConfigError, match=r"runs/run/tokenizer\.json has another vocabulary"):
        open_weights("run:run", str(tmp_path / "runs"), part, shapes, other)


@pytest.mark.dist
def test_zero3_begins_so_too_and_a_run_that_learns_nothing_exports_what_it_began_with(
    tmp_path: Path, run_trainer
) -> None:
    theirs = make_folder("t5", tmp_path / "folder")
    words = words_of("t5", tmp_path / "folder", "engine=zero3", "optimizer.lr=0")
    runs = run_trainer(words, ranks=2).check().runs_dir
    with torch.inference_mode():
        expected = theirs(**batch_of_theirs())
        assert first_loss(runs) == pytest.approx(float(expected.loss), rel=1e-5)
        assert export([f"runs_dir={runs}", "run=run", f"to={tmp_path / 'out'}", "dtype=fp32"]) == 0
        again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(again(**batch_of_theirs()).logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert again.generation_config.decoder_start_token_id == PAD


def test_one_parameter_is_held_at_a_time(tmp_path: Path) -> None:
    """While it fills the engine's pieces: the one before may still be there when the next is read."""
    theirs = make_folder("t5", tmp_path)
    part = part_of(theirs.config.to_dict())
    model = build(part, "model")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights, held, most = open_weights(f"hf:{tmp_path}", "runs", part, shapes), [], []

    def values(name: str) -> torch.Tensor:
        value = weights.values(name)
        held.append(weakref.ref(value))
        most.append(sum(one() is not None for one in held))
        return value

    def fragments():
        for name, parameter in model.named_parameters():
            whole = parameter.detach().view(-1)
            half = len(whole) // 2  # two pieces of each, as ranks would have them: read once
            yield Fragment(name, "master", 0, tuple(parameter.shape), whole[:half])
            yield Fragment(name, "master", half, tuple(parameter.shape), whole[half:])

    engine = SimpleNamespace(fragments=fragments, scalars=dict, after_load=lambda scalars: None)
    initialise(engine, lambda: build(part, "model"), 0, SimpleNamespace(values=values))
    assert len(held) == len(shapes) and max(most) <= 2
    assert torch.equal(model.embedding.weight, theirs.shared.weight)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    test_t5.make().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil: one file of weights, and config.json."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    return tmp_path


def opened(folder: Path, **arguments):
    part = part_of(test_t5.make().config.to_dict())
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in build(part, "model").named_parameters()}
    return open_weights(f"hf:{folder}", "runs", {**part, **arguments.pop("model", {})}, shapes, **arguments)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_tensors_that_are_missing_too_many_or_of_another_shape_are_all_listed(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["encoder.final_layernorm.weight"] = tensors.pop("encoder.final_layer_norm.weight")
    tensors["decoder.final_layer_norm.weight"] = torch.zeros(31)
    del tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    for part in (
        "encoder.final_layer_norm.weight is missing (the nearest there is encoder.final_layernorm.weight)",
        "encoder.final_layernorm.weight has no place in the model",
        "decoder.final_layer_norm.weight is [31], not [32]",
        "decoder.block.1.layer.2.DenseReluDense.wo.weight is missing",
    ):
        assert part in str(caught.value)


def test_the_bias_that_the_first_t5_have_saved_for_nothing_is_left_out(folder: Path) -> None:
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file({**tensors_of(folder), name: torch.zeros(32, 4)}, folder / "model.safetensors")
    opened(folder)


def test_a_bart_without_a_bias_of_the_output_is_told_that_the_folder_has_one(tmp_path: Path) -> None:
    theirs = test_bart.make("bart")
    theirs.save_pretrained(tmp_path)
    part = {**part_of(theirs.config.to_dict()), "head_bias": False, "d_kv": 8}  # d_kv is what null stands for
    with pytest.raises(ConfigError, match=r"; set model\.head_bias=true\.$"):
        open_weights(f"hf:{tmp_path}", "runs", part, {})


def spoil(folder: Path, name: str, text: str | None) -> None:
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "has no config.json, so nothing says which model"),
        ("config.json", '{"model_type": "t5"', "config.json cannot be read"),
        ("config.json", '["t5"]', "config.json holds no mapping"),
        ("config.json", '{"model_type": "t5", "vocab_size": 61}', "config.json does not say d_model"),
        ("config.json", '{"model_type": "mamba"}', "model_type='mamba' .* known are bart, .*llama, marian.*t5"),
        ("config.json", '{"model_type": "gpt5"}', "model=hf"),
        ("model.safetensors", None, "has no model.safetensors, .* it has config.json"),
        ("model.safetensors", "short", "no whole safetensors file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../a"}}', "no weight_map from names to files of its"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is no whole"),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, name: str, text: str | None, message: str) -> None:
    spoil(folder, name, text)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        opened(folder)


def test_a_file_cut_short_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no whole safetensors file"):
        opened(folder)


def test_another_model_tokenizer_and_begin_are_told_with_their_cure(folder: Path) -> None:
    TOKENIZER.save(folder / "tokenizer.json")
    run_tokenizer = TrainedTokenizer(vocab_size=300).prepare(lambda: iter(["the light"] * 9))
    with pytest.raises(ConfigError) as caught:
        opened(folder, model={"d_ff": 41, "bias": True}, tokenizer=run_tokenizer, start_id=1)
    model, tokenizer = caught.value.problems
    assert model.endswith("set model.d_ff=40 model.bias=false.")
    assert "another vocabulary than the run's tokenizer (260 entries" in tokenizer
    assert tokenizer.endswith(f"tokenizer=file tokenizer.path={folder}/tokenizer.json tokenizer.vocab_size=61.")
    with pytest.raises(ConfigError) as caught:
        opened(folder, tokenizer=TOKENIZER, start_id=1)
    (start,) = caught.value.problems
    assert start.endswith("(decoder_start_token_id=0), the task with <s>; set task.start_token='\"<pad>\"'.")
    opened(folder, tokenizer=TOKENIZER, start_id=0)


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    make_folder("marian", tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"set task\.start_token='.<pad>.'"):
        here(words_of("marian", tmp_path / "folder", "task.start_token=null"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_another_run_is_one_of_the_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "runs" / "here").mkdir(parents=True)
    (tmp_path / "runs" / "here" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"init_from=run:\.\./\.\./etc: '\.\./\.\./etc' is no name of a run"):
        open_weights("run:../../etc", str(tmp_path / "runs"), {}, {})
    with pytest.raises(CheckpointError, match=r"init_from=run:nobody: there is no .*; runs in .*: here\."):
        open_weights("run:nobody", str(tmp_path / "runs"), {}, {})
