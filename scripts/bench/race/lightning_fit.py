"""Entrant lightning: Lightning's Trainer, as its documentation recommends.

precision="bf16-mixed", a data loader with a worker that stays, `self.log`, gradients clipped by the Trainer. It
trains transformers' model on the data, encoded and kept on the disk, and with the collator that entrant hf uses.

Two ranks: DeepSpeedStrategy(stage=2) with its defaults, which refuses a CPU before anything is tried. DeepSpeed
itself runs there, so `on_cpu` leaves out the refusal and numbers the devices, as those of CUDA are; nothing else is
changed.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Events, factor, read_spec, size_of
from hf import count_targets, make_data


def make_module(spec: dict[str, Any], model: torch.nn.Module) -> Any:
    """The LightningModule that a user would write."""
    import lightning

    settings = spec["optimizer"]

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.log("train_loss", loss)
            return loss

        def on_validation_epoch_start(self) -> None:
            self.totals = torch.zeros(2, dtype=torch.float64)

        def validation_step(self, batch: Any, index: int) -> None:
            tokens = count_targets(batch["labels"], spec["kind"])
            self.totals += torch.tensor([float(self.model(**batch).loss) * tokens, tokens], dtype=torch.float64)

        def configure_optimizers(self) -> Any:
            groups = [
                {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": settings["weight_decay"]},
                {"params": [p for p in self.parameters() if p.dim() <= 1], "weight_decay": 0.0},
            ]
            fused = spec["engine"] == "zero2"  # with "bf16-mixed" and clipping Lightning refuses a fused optimizer
            optimizer = torch.optim.AdamW(
                groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"], fused=fused
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, warmup=settings["warmup"]))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def padding_of(batch: Any, kind: str) -> float:
    """The padded share of the positions of a batch."""
    if kind == "packed":
        return 0.0
    filled = count_targets(batch["labels"], kind) + int(batch["attention_mask"].sum())
    return 1 - filled / (batch["labels"].numel() + batch["input_ids"].numel())


def make_callback(spec: dict[str, Any], events: Events) -> Any:
    """Tells the events, and saves as told."""
    import lightning
    import models

    class Told(lightning.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            events.write("ready", parameters=models.count(module))

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            step, kind = trainer.global_step, spec["kind"]
            facts = {"target_tokens": count_targets(batch["labels"], kind), "padding": padding_of(batch, kind)}
            events.write("step", step=step, loss=float(outputs["loss"]), **facts)
            every = spec["save_every"]
            if step == spec["save_at"] or (every and step % every == 0):
                path = f"{spec['out']}/checkpoints/step_{step}.ckpt"
                trainer.save_checkpoint(path, weights_only=bool(every))
                events.write("saved", step=step, path=path, bytes=size_of(path))

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            events.write("validating", step=trainer.global_step)

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            loss, tokens = trainer.strategy.reduce(module.totals, reduce_op="sum").tolist()
            events.write("validated", step=trainer.global_step, loss=loss / tokens)

    return Told()


def on_cpu(spec: dict[str, Any]) -> Any:
    """DeepSpeedStrategy, stage 2, that does not ask for CUDA."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # what DeepSpeed compiles for a minute at its first use: entrants of another environment would make it do so again
    os.environ["TORCH_EXTENSIONS_DIR"] = f"{spec['cache']}/lightning_extensions"
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    class OnCpu(DeepSpeedStrategy):  # type: ignore[misc]
        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)  # what DeepSpeedStrategy's goes on to once it has seen CUDA

    return OnCpu(stage=2, parallel_devices=[torch.device("cpu", index) for index in range(spec["ranks"])])


def make_trainer(spec: dict[str, Any], callback: Any) -> Any:
    """Lightning's Trainer for this lap."""
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    strategy = on_cpu(spec) if spec["engine"] == "zero2" else "ddp" if spec["ranks"] > 1 else "auto"
    return lightning.Trainer(
        accelerator="cpu",
        devices=spec["ranks"],
        strategy=strategy,
        precision="bf16-mixed",
        max_steps=spec["steps"],
        max_epochs=-1,
        gradient_clip_val=spec["optimizer"]["clip_norm"],
        val_check_interval=spec["validate_every"] or None,
        check_val_every_n_epoch=None,
        limit_val_batches=None if spec["validate_every"] else 0,
        num_sanity_val_steps=0,
        logger=CSVLogger(spec["out"]),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def make_loaders(spec: dict[str, Any], model: torch.nn.Module) -> tuple[Any, Any]:
    """For training and validation; padded to the longest of a batch."""
    import models
    from transformers import DataCollatorForSeq2Seq, default_data_collator

    packed = spec["kind"] == "packed"
    collate = default_data_collator if packed else DataCollatorForSeq2Seq(models.tokenizer(spec), model=model)
    train, validation = make_data(spec)
    loader = partial(torch.utils.data.DataLoader, collate_fn=collate)
    return loader(
        train, batch_size=spec["batch"] // spec["ranks"], shuffle=True, num_workers=1, persistent_workers=True
    ), loader(validation, batch_size=32)


def read_weights(checkpoint: str) -> dict[str, torch.Tensor]:
    """Of the model, from a file of Lightning's or a folder of DeepSpeed's."""
    path = Path(checkpoint)
    if path.is_dir():
        weights = torch.load(path / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    else:
        weights = torch.load(path, weights_only=False)["state_dict"]
    return {name.removeprefix("model."): value.float() for name, value in weights.items()}


def main() -> None:
    """Train until ended, or translate."""
    spec = read_spec()
    if "translate" in spec:
        import models

        model = models.build(spec)
        model.load_state_dict(read_weights(spec["translate"]["checkpoint"]))
        models.translate(spec, model)
        return
    events = Events(spec["out"])
    events.write("start", pid=os.getpid())
    import lightning
    import models

    lightning.seed_everything(spec["seed"], verbose=False)
    model = models.build(spec).train()
    training, validation = make_loaders(spec, model)
    trainer = make_trainer(spec, make_callback(spec, events))
    trainer.fit(make_module(spec, model), training, validation if spec["validate_every"] else None)


if __name__ == "__main__":
    main()
