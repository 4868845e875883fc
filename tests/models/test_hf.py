"""Any model of transformers behind our contract: the same text, trained, sharded, with adapters, used again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.test_training import curve
from trainer.checkpoint.load import find
from trainer.decoding import BeamOptions, beam_search
from trainer.errors import ConfigError
from trainer.models.hf import HFModel
from trainer.pretrained import open_weights

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SHAPE = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "t5"
    torch.manual_seed(0)
    config = transformers.T5Config(**SHAPE, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str) -> tuple[HFModel, torch.nn.Module]:
    theirs = getattr(transformers, {"seq2seq": "AutoModelForSeq2SeqLM"}.get(kind, "AutoModelForCausalLM"))
    reference = theirs.from_pretrained(folder).eval()
    ours = HFModel(str(folder), kind).eval()
    ours.model.load_state_dict(reference.state_dict())
    return ours, reference


def padded(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    return ids, mask


def test_beams_of_an_encoder_decoder_are_theirs(t5):
    ours, reference = loaded(t5, "seq2seq")
    ids, mask = padded(300)
    with torch.inference_mode():
        options = BeamOptions(beam_size=3, max_length=7, length_penalty=0.0)
        written = beam_search(ours, {"source_ids": ids, "source_mask": mask}, 0, 1, 0, options)
        expected = reference.generate(
            input_ids=ids, attention_mask=mask.long(), num_beams=3, max_new_tokens=7, length_penalty=0.0
        )
    assert [[id_ for id_ in row if id_ > 1] for row in expected.tolist()] == written


def test_a_prompt_padded_on_the_right_is_continued_as_theirs(llama):
    ours, reference = loaded(llama, "causal_lm")
    ids, mask = padded(61)
    order = mask.long().argsort(dim=1, stable=True)
    with torch.inference_mode():
        options = BeamOptions(beam_size=1, max_length=7, length_penalty=0.0)
        written = beam_search(ours, {"input_ids": ids, "attention_mask": mask}, 1, 2, 0, options)
        expected = reference.generate(
            input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order).long(), max_new_tokens=7
        )
    assert expected[:, 9:].tolist() == written


def test_first_weights_depend_on_seed_and_name_and_tables_stay_exact(llama):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = HFModel(str(llama), "causal_lm", lora={"r": 4, "target_modules": ["q_proj"]})
        model.reset_parameters(torch.Generator().manual_seed(seed))
        return {name.rpartition("layers.")[2]: parameter.detach() for name, parameter in model.named_parameters()}

    one, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    query, key = "0.self_attn.q_proj.base_layer.weight", "0.self_attn.k_proj.weight"
    assert not torch.equal(one[query], one[key]) and not torch.equal(one[query], other[query])
    assert one[query].std() == pytest.approx(0.02, rel=0.1)
    assert not one["0.self_attn.q_proj.lora_B.default.weight"].any()
    model = HFModel(str(llama), "causal_lm").bfloat16()
    tables = dict(model.named_buffers())
    assert tables and all(table.dtype == torch.float32 for table in tables.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_model_that_is_none_is_refused(tmp_path, t5):
    with pytest.raises(ConfigError, match=r"model\.path=.*nowhere"):
        HFModel(str(tmp_path / "nowhere"), "seq2seq")
    with pytest.raises(ConfigError, match=r"model\.kind=sequence is not known; choose one of seq2seq"):
        HFModel(str(t5), "sequence")
    with pytest.raises(ConfigError, match=r"model\.lora="):
        HFModel(str(t5), "seq2seq", lora={"rank": 4})
    with pytest.raises(ConfigError, match=r"lora_magnitude_vector is not known here; plain LoRA"):
        HFModel(str(t5), "seq2seq", lora={"r": 4, "target_modules": ["q"], "use_dora": True})
    with pytest.raises(ConfigError, match=r"init_lora_weights=pissa: adapters begin"):
        HFModel(str(t5), "seq2seq", lora={"r": 4, "target_modules": ["q"], "init_lora_weights": "pissa"})


@pytest.mark.dist
@pytest.mark.slow
def test_adapters_train_the_same_on_any_engine_and_alone_are_saved(run_trainer, t5):
    """Frozen weights come from the folder, under ZeRO-3 too and on resume; the checkpoint has the adapters alone."""
    words = [
        *("model=hf", f"model.path={t5}", "model.kind=seq2seq", "tokenizer=byte", "logging=[]", "batch.global_size=24"),
        *("precision=fp32", "steps=4", "schedule=constant", "checkpoint.every=2", "checkpoint.keep=5", "log.every=1"),
        *("eval.final_split=none", "task.overlong=truncate", "optimizer.lr=1e-3", "schedule.warmup=0"),
        *("model.lora={r: 4, target_modules: [q, v]}", "model.config={dropout_rate: 0.0}"),
    ]
    runs = run_trainer([*words, "name=plain"]).check().runs_dir
    run_trainer([*words, "name=zero3", "engine=zero3"], ranks=2).check()
    one, other = curve(runs, "plain"), curve(runs, "zero3")
    assert one[4] != one[1] and other == pytest.approx(one, rel=1e-5)
    manifest = json.loads((runs / "plain" / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["parameters"] and all(".lora_" in name for name in manifest["parameters"])
    run_trainer([*words, "name=zero3", "engine=plain", "steps=5"]).check()
    assert find(runs / "zero3" / "checkpoints", "latest").state.step == 5
    done = run_trainer(["run=plain", "split=validation", "max_samples=8", "generate=false"], module="trainer.evaluate")
    assert "eval/loss" in done.check().stdout


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_weights_come_from_a_folder_and_go_into_another(request, name, tmp_path):
    """As `init_from` and the export do it, with the same logits."""
    from tests.formats.parity import assert_close, theirs_of

    folder = request.getfixturevalue(name)
    kind, vocab_size = ("seq2seq", 300) if name == "t5" else ("causal_lm", 61)
    part = {"_target_": "trainer.models.hf.HFModel", "path": str(folder), "kind": kind}
    model = HFModel(str(folder), kind).eval()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = open_weights(f"hf:{folder}", "runs", part, shapes)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights.values(parameter_name).view(parameter.shape))
    model.part = part
    _, reference = loaded(folder, kind)
    ids, mask = padded(vocab_size)
    batch = {"source_ids": ids, "source_mask": mask, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    inputs = {"input_ids": ids} | ({"attention_mask": mask, "decoder_input_ids": ids} if name == "t5" else {})
    with torch.inference_mode():
        expected = reference(**inputs).logits
        assert_close(model(batch), expected)
        assert_close(theirs_of(model, tmp_path / "out")(**inputs).logits, expected)
