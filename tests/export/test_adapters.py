"""Adapters of a run exported: by themselves as peft loads them, and merged; both compute what the run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.test_pretrained import PAIRS, here, words_of
from trainer.data.tokenizer import ByteTokenizer
from trainer.export.__main__ import main
from trainer.restore import find_run, load_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

COMMON = ("name=run", "steps=3", "precision=fp32", "schedule=constant", "schedule.warmup=0", "optimizer.lr=0.02")
IDS = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(3))


def t5(folder: Path) -> list[str]:
    """Queries and values of every attention."""
    torch.manual_seed(0)
    shape = {"vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**shape, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    ByteTokenizer().prepare(lambda: iter(())).save(folder / "tokenizer.json")
    words = [word for word in words_of("t5", folder) if not word.startswith(("model", "init_from", "steps", "sched"))]
    return [*words, "model.kind=seq2seq", "model.lora={r: 4, target_modules: [q, v], lora_alpha: 16}"]


def bert(folder: Path) -> list[str]:
    """Queries with their biases, and a new classifier as a whole; the scale of rsLoRA."""
    torch.manual_seed(0)
    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    transformers.BertModel(transformers.BertConfig(**shape, num_attention_heads=4)).save_pretrained(folder)
    for split in ("train", "validation", "test"):
        rows = (json.dumps({"text": text, "label": number % 3}) + "\n" for number, (text, _) in enumerate(PAIRS))
        (folder.parent / f"{split}.jsonl").write_text("".join(rows))
    lora = "{r: 4, target_modules: [query], use_rslora: true, bias: lora_only, modules_to_save: [classifier]}"
    return [
        *("model.kind=sequence_classification", "+model.config.num_labels=3", f"model.lora={lora}"),
        *("task=text_classification", "task.num_classes=3", "data=files", f"data.path={folder.parent}"),
        *("tokenizer=byte", f"batch.global_size={len(PAIRS)}", "eval.final_split=none", "checkpoint=end", "logging=[]"),
    ]


@pytest.mark.parametrize("kind", [t5, bert])
def test_adapters_load_by_peft_and_merged_by_transformers(kind, tmp_path: Path, capsys) -> None:
    folder, runs = tmp_path / "data" / "base", tmp_path / "runs"
    folder.mkdir(parents=True)
    here(["model=hf", f"model.path={folder}", *kind(folder), *COMMON], runs)
    for name, more in (("adapters", ["adapters=true"]), ("merged", ["max_shard_gb=0.00002"])):
        assert main([f"runs_dir={runs}", "run=run", f"to={tmp_path / name}", "dtype=fp32", *more]) == 0
    assert capsys.readouterr().out.count("logits equal to") == 2
    classes = {t5: ("AutoModelForSeq2SeqLM", {}), bert: ("AutoModelForSequenceClassification", {"num_labels": 3})}
    auto, options = getattr(transformers, classes[kind][0]), classes[kind][1]
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if kind is t5 else {})
    ours = load_model(find_run("run", str(runs))).eval()
    with torch.inference_mode():
        expected = ours({"source_ids": IDS, **inputs})
        before = auto.from_pretrained(folder, **options).eval()(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(auto.from_pretrained(folder, **options), tmp_path / "adapters").eval()
        merged = auto.from_pretrained(tmp_path / "merged").eval()
        for theirs in (adapted, merged):
            torch.testing.assert_close(theirs(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3), "the run has learnt something"

    said = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder) and said["r"] == 4
    files = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert "adapter_model.safetensors" in files and not files & {"config.json", "model.safetensors"}
    assert "lora" not in (tmp_path / "merged" / "model.safetensors.index.json").read_text()
    assert f"base_model: {folder}" in (tmp_path / "adapters" / "README.md").read_text()


def test_what_has_no_adapters_or_no_public_base_is_refused(tmp_path: Path, capsys) -> None:
    folder, runs = tmp_path / "data" / "base", tmp_path / "runs"
    folder.mkdir(parents=True)
    words = ["model=hf", f"model.path={folder}", *t5(folder), *COMMON]
    here([word for word in words if "lora" not in word], runs)
    assert main([f"runs_dir={runs}", "run=run", f"to={tmp_path / 'out'}", "adapters=true"]) == 2
    assert "the run run has none (model.lora)" in capsys.readouterr().err

    here([*words, "name=random", "model.pretrained=false"], runs)
    assert main([f"runs_dir={runs}", "run=random", f"to={tmp_path / 'out'}", "adapters=true"]) == 2
    assert "trained over the weights of nothing" in capsys.readouterr().err
    assert main([f"runs_dir={runs}", "run=random", f"to={tmp_path / 'out'}"]) == 2
    assert "model.pretrained=false" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
