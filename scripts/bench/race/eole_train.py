"""Entrant eole: `eole train` on files of pieces, set up as its recipe for WMT17.

Batches and gradients by tokens, its default bucket of 262,144 examples sorted by length and its two data workers,
shared embeddings, rates as Noam's. Precision: compute_dtype "bf16", which on a CPU is autocast.

Its shape differs from Marian's: norms before the sub-layers, hence two more at the ends of encoder and decoder (4 d
parameters); a source has no end token. A batch keeps each source once, so equal ones that sorting puts side by side
are left out. It has no data parallelism on CPUs, nor ZeRO.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pieces
from common import Events, read_spec, size_of

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def make_settings(spec: dict[str, Any]) -> dict[str, Any]:
    """What a user would write into train.yaml."""
    folder, out = pieces.cut(spec), Path(spec["out"])
    shape, settings = spec["model"], spec["optimizer"]
    vocabulary = out / "vocabulary.txt"
    vocabulary.write_text("".join(f"{piece}\n" for piece in pieces.vocabulary(spec)), encoding="utf-8")
    data = {
        name: {"path_src": str(folder / f"{split}.source"), "path_tgt": str(folder / f"{split}.target")}
        for name, split in (("corpus_1", "train"), ("valid", "validation"))
    }
    return {
        "seed": spec["seed"] + 1,  # 0 is none
        "report_every": 100,
        "src_vocab": str(vocabulary),
        "tgt_vocab": str(vocabulary),
        "src_vocab_size": spec["vocab_size"],
        "tgt_vocab_size": spec["vocab_size"],
        "share_vocab": True,
        **SPECIAL,
        "data": data,
        "training": {
            "model_path": str(out / "checkpoints"),
            "train_steps": spec["steps"],
            "save_checkpoint_steps": spec["save_every"] or spec["save_at"] or spec["steps"],
            "valid_steps": spec["validate_every"] or spec["steps"],
            "batch_type": "tokens",
            "normalization": "tokens",
            "batch_size": round(spec["batch"] * pieces.longer(folder)),
            "valid_batch_size": 4096,
            "world_size": 1,
            "gpu_ranks": [],
            "compute_dtype": spec["precision"],
            "optim": "adamw",
            "learning_rate": settings["lr"] * (shape["d_model"] * settings["warmup"]) ** 0.5,
            "decay_method": "noam",
            "warmup_steps": settings["warmup"],
            "adam_beta1": settings["betas"][0],
            "adam_beta2": settings["betas"][1],
            "adam_eps": settings["eps"],
            "weight_decay": settings["weight_decay"],
            "max_grad_norm": settings["clip_norm"],
            "label_smoothing": 0.0,
            "dropout": [shape["dropout"]],
            "attention_dropout": [0.0],
            "param_init_method": "xavier_uniform",
        },
        "model": {
            "architecture": "transformer",
            "hidden_size": shape["d_model"],
            "encoder": {"layers": shape["encoder_layers"]},
            "decoder": {"layers": shape["decoder_layers"]},
            "heads": shape["num_heads"],
            "transformer_ff": shape["d_ff"],
            "mlp_activation_fn": "silu",
            "add_qkvbias": True,
            "add_final_linear_bias": True,
            "add_ffnbias": True,
            "generator_bias": False,
            "share_embeddings": True,
            "share_decoder_embeddings": True,
            "embeddings": {"word_vec_size": shape["d_model"], "position_encoding": True},
        },
    }


def watched(spec: dict[str, Any], events: Events, base: type) -> type:
    """eole's Trainer, telling the events at its own points for extension."""

    class Told(base):  # type: ignore[misc]
        def train(self, *arguments: Any, **named: Any) -> Any:
            events.write("ready", parameters=sum(p.numel() for p in self.model.parameters()))
            save = self.model_saver.save

            def told_save(step: int, **more: Any) -> None:
                if spec["save_every"] or step == spec["save_at"]:
                    save(step, **more)
                    path = f"{spec['out']}/checkpoints/step_{step}"
                    events.write("saved", step=step, path=path, bytes=size_of(path))

            self.model_saver.save = told_save
            return super().train(*arguments, **named)

        def _train_step(self, batches: Any, normalization: Any, total: Any, report: Any, step: int = 0) -> None:
            before = total.loss
            super()._train_step(batches, normalization, total, report, step=step)
            pad = self.train_loss.padding_idx
            targets = sum(int(batch["tgt"][:, 1:].ne(pad).sum()) for batch in batches)
            filled = targets + sum(int(batch["srclen"].sum()) for batch in batches)
            places = sum(batch["tgt"][:, 1:].numel() + batch["src"].numel() for batch in batches)
            facts = {"target_tokens": targets, "padding": 1 - filled / places}
            events.write("step", step=step, loss=(total.loss - before) / targets, **facts)

        def validate(self, *arguments: Any, **named: Any) -> Any:
            step = self.optim.training_step - 1
            events.write("validating", step=step)
            stats = super().validate(*arguments, **named)
            events.write("validated", step=step, loss=stats.loss / stats.n_tokens)
            return stats

    return Told


def translate(spec: dict[str, Any]) -> None:
    """`eole predict` of the lines, and the pieces joined again."""
    from eole.config.run import PredictConfig
    from eole.inference_engine import InferenceEnginePY

    told = spec["translate"]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "source"), Path(folder, "output")
        pieces.write_cut(spec, source)
        config = PredictConfig(
            model_path=told["checkpoint"],
            src=str(source),
            output=str(output),
            transforms=[],
            beam_size=told["beams"],
            max_length=spec["max_length"] - 1,
            batch_size=64,
            world_size=1,
            gpu_ranks=[],
            compute_dtype=spec["precision"],
        )
        InferenceEnginePY(config).infer_file()
        pieces.write_joined(spec, output)


def main() -> None:
    """Train until ended, or translate."""
    spec = read_spec()
    if "translate" in spec:
        translate(spec)
        return
    events = pieces.started(spec, "eole")
    import eole.trainer
    from eole.bin.run.train import train
    from eole.config.run import TrainConfig

    eole.trainer.Trainer = watched(spec, events, eole.trainer.Trainer)
    train(TrainConfig(**make_settings(spec)))


if __name__ == "__main__":
    main()
