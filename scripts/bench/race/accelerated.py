"""Entrant accelerate: a loop by transformers' model and accelerate, as the examples run_translation_no_trainer.py and
run_clm_no_trainer.py have it: mixed_precision="bf16" on one process; on two ranks DeepSpeedPlugin(zero_stage=2), as
accelerate's guide to DeepSpeed recommends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from common import Events, factor, rank, read_spec, size_of
from hf import count_targets, make_data


def make_loader(spec: dict[str, Any], model: Any) -> tuple[Any, Any]:
    """Loaders of shuffled training batches, this rank's share each, and of the validation data."""
    import models
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq, default_data_collator

    train, validation = make_data(spec)
    packed = spec["kind"] == "packed"
    collate = default_data_collator if packed else DataCollatorForSeq2Seq(models.tokenizer(spec), model=model)
    size = spec["batch"] // spec["ranks"]
    shuffled = DataLoader(train, shuffle=True, collate_fn=collate, batch_size=size)
    return shuffled, DataLoader(validation, collate_fn=collate, batch_size=32)


def facts_of(batch: Any, kind: str) -> dict[str, Any]:
    """Labels that count, and the padded share of all positions."""
    labels = batch["labels"]
    targets = count_targets(labels, kind)
    if kind == "packed":
        return {"target_tokens": targets, "padding": 0.0}
    cells = labels.numel() + batch["input_ids"].numel()
    return {"target_tokens": targets, "padding": 1 - (targets + int(batch["attention_mask"].sum())) / cells}


def make_accelerator(spec: dict[str, Any]) -> Any:
    """bf16; ZeRO-2 where the lap asks for it."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    plugin = None
    if spec["engine"] == "zero2":
        plugin = DeepSpeedPlugin(zero_stage=2, gradient_clipping=spec["optimizer"]["clip_norm"])
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = spec["batch"] // spec["ranks"]
    return Accelerator(mixed_precision="bf16", cpu=True, deepspeed_plugin=plugin)


def make_optimizer(model: torch.nn.Module, settings: dict[str, Any]) -> tuple[Any, Any]:
    """AdamW without decay of biases and norms, and the schedule, as the examples make them."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    chosen = {"lr": settings["lr"], "betas": tuple(settings["betas"]), "eps": settings["eps"]}
    optimizer = torch.optim.AdamW(groups, **chosen)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, settings["warmup"]))


def main() -> None:
    """Train until ended."""
    spec = read_spec()
    events = Events(spec["out"])
    events.write("start", pid=os.getpid())
    import models

    accelerator = make_accelerator(spec)
    model = models.build(spec)
    events.write("ready", parameters=models.count(model))
    optimizer, schedule = make_optimizer(model, spec["optimizer"])
    train, _ = make_loader(spec, model)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    model.train()
    step = 0
    while True:
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            if spec["engine"] == "plain":
                accelerator.clip_grad_norm_(model.parameters(), spec["optimizer"]["clip_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            events.write("step", step=step, **facts_of(batch, spec["kind"]))
            if step == spec["save_at"]:
                path = Path(spec["out"]) / "checkpoint"
                accelerator.save_state(str(path))
                if rank() == 0:
                    events.write("saved", step=step, path=str(path), bytes=size_of(path))


if __name__ == "__main__":
    main()
