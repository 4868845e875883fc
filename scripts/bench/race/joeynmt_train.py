"""Entrant joeynmt: JoeyNMT's training on files of pieces (level "word", as for text cut beforehand).

As its transformer recipes: batches of so many pairs (its default), drawn at random and not sorted by length,
gradients by tokens, post-norm layers with the activation "swish", embeddings and softmax tied: Marian's shape to the
parameter, but that it drops attention weights too.

It offers fp16 on GPUs only, so its options alone give fp32 on a CPU; here its own switch of autocast is handed bf16.
No data workers (its default), no data parallelism on CPUs, no ZeRO. Its validation also translates; here it scores
the references alone, as the others do.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pieces
from common import Events, read_spec, size_of

BF16 = {"device_type": "cpu", "enabled": True}
NEVER = 10**9


def make_settings(spec: dict[str, Any]) -> dict[str, Any]:
    """What a user would write into config.yaml."""
    folder, out = pieces.cut(spec), Path(spec["out"])
    vocabulary = out / "vocabulary.txt"
    vocabulary.write_text("".join(f"{piece}\n" for piece in pieces.vocabulary(spec)), encoding="utf-8")
    side = {"level": "word", "max_length": spec["max_length"], "voc_file": str(vocabulary)}
    settings = spec["optimizer"]
    validate_every = spec["validate_every"] or NEVER
    return {
        "name": spec["lap"],
        "model_dir": str(out / "checkpoints"),
        "use_cuda": False,
        "random_seed": spec["seed"],
        "data": {
            "train": str(folder / "train"),
            "dev": str(folder / "validation"),
            "src": {"lang": "source", **side},
            "trg": {"lang": "target", **side},
        },
        "testing": {"batch_size": 64, "max_output_length": spec["max_length"] - 1},
        "training": {
            "normalization": "tokens",
            "optimizer": "adamw",
            "adam_betas": settings["betas"],
            "learning_rate": settings["lr"],
            "learning_rate_min": 0.0,
            "learning_rate_warmup": settings["warmup"],
            "scheduling": "warmupinversesquareroot",
            "weight_decay": settings["weight_decay"],
            "clip_grad_norm": settings["clip_norm"],
            "batch_size": spec["batch"],
            "epochs": NEVER,
            "updates": spec["steps"],
            "logging_freq": math.gcd(100, validate_every),
            "validation_freq": validate_every,
            "early_stopping_metric": "loss",
        },
        "model": make_shape(spec),
    }


def make_shape(spec: dict[str, Any]) -> dict[str, Any]:
    """The part "model" of config.yaml."""
    shape = spec["model"]
    side = {
        "type": "transformer",
        "num_heads": shape["num_heads"],
        "hidden_size": shape["d_model"],
        "ff_size": shape["d_ff"],
        "dropout": shape["dropout"],
        "layer_norm": "post",
        "activation": "swish",
        "embeddings": {"embedding_dim": shape["d_model"], "scale": True},
    }
    return {
        "initializer": "xavier_uniform",
        "embed_initializer": "xavier_uniform",
        "bias_initializer": "zeros",
        "tied_embeddings": True,
        "tied_softmax": True,
        "encoder": {**side, "num_layers": shape["encoder_layers"]},
        "decoder": {**side, "num_layers": shape["decoder_layers"]},
    }


def watched(spec: dict[str, Any], events: Events, base: type) -> type:
    """JoeyNMT's TrainManager, in bf16 and telling the events."""

    class Told(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **{**named, "autocast": autocast(spec)})
            self.step = self.scheduler.step
            self.scheduler.step = self._told_step
            events.write("ready", parameters=sum(p.numel() for p in self.model.parameters()))

        def _train_step(self, batch: Any) -> Any:
            self.batch = batch
            done, every = self.stats.steps, spec["save_every"]
            if done and (done == spec["save_at"] or (every and done % every == 0)):
                self._save_checkpoint(False, math.nan)
                path = f"{self.model_dir}/{done}.ckpt"
                events.write("saved", step=done, path=path, bytes=size_of(path))
            self.result = super()._train_step(batch)
            return self.result

        def _told_step(self, step: int) -> None:
            """The last of an update: the schedule goes on."""
            self.step(step)
            batch = self.batch
            filled = batch.ntokens + int(batch.src_length.sum())
            padding = 1 - filled / (batch.trg.numel() + batch.src.numel())
            facts = {"target_tokens": batch.ntokens, "padding": padding}
            events.write("step", step=step + 1, loss=self.result[0], **facts)

        def _validate(self, valid_data: Any) -> None:
            events.write("validating", step=self.stats.steps)
            events.write("validated", step=self.stats.steps, loss=validation_loss(self, valid_data))

    return Told


def autocast(spec: dict[str, Any]) -> dict[str, Any]:
    """What JoeyNMT hands to torch.autocast."""
    import torch

    return {**BF16, "dtype": torch.bfloat16} if spec["precision"] == "bf16" else {**BF16, "enabled": False}


def validation_loss(manager: Any, data: Any) -> float:
    """Nats a target token, without the search for translations that JoeyNMT's validation makes too."""
    import torch

    args, model = manager.dev_cfg, manager.model.eval()
    indices = {"pad_index": model.pad_index, "eos_index": model.eos_index}
    loss, tokens = 0.0, 0
    for batch in data.make_iter(args.batch_size, args.batch_type, seed=data.seed, **indices):
        with torch.autocast(**manager.autocast), torch.no_grad():
            loss += float(model(return_type="loss", **vars(batch))[0])
        tokens += batch.ntokens
    return loss / tokens


def translate(spec: dict[str, Any]) -> None:
    """`joeynmt test` of the lines, and the pieces joined again."""
    from joeynmt.prediction import test

    told = spec["translate"]
    settings = make_settings(spec)
    with tempfile.TemporaryDirectory() as folder:
        pieces.write_cut(spec, Path(folder, "test.source"))
        del settings["data"]["train"], settings["data"]["dev"]
        settings["data"]["test"] = f"{folder}/test"
        settings["testing"] |= {"load_model": told["checkpoint"], "beam_size": told["beams"], "beam_alpha": 1.0}
        test(settings, output_path=f"{folder}/output")
        pieces.write_joined(spec, Path(folder, "output.test"))


def main() -> None:
    """Train until ended, or translate."""
    spec = read_spec()
    if "translate" in spec:
        translate(spec)
        return
    events = pieces.started(spec, "JoeyNMT")
    from joeynmt import training
    from joeynmt.helpers import make_model_dir

    training.TrainManager = watched(spec, events, training.TrainManager)
    settings = make_settings(spec)
    make_model_dir(Path(settings["model_dir"]), overwrite=True)
    training.train(rank=0, world_size=0, cfg=settings, skip_test=True)


if __name__ == "__main__":
    main()
