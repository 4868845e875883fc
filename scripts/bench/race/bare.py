"""Entrant bare: a loop that a careful user writes by hand around the trainer's own model: random batches padded to
their longest, bf16 parameters with fp32 masters, PyTorch's fused AdamW, gradients divided by the tokens of the global
batch and clipped. Two ranks: DistributedDataParallel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Events, encoded, factor, rank, read_spec, rows_of, size_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100


def make_data(spec: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The train split, encoded; from the cache after the first time."""
    path = Path(spec["cache"]) / "bare.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        samples = encoded(spec["data"]["train"], spec["tokenizer"], spec["ids"]["eos"])
        if spec["kind"] == "packed":
            samples = ({"text": row} for row in rows_of(samples, spec["max_length"]))
        torch.save([{name: torch.tensor(ids) for name, ids in sample.items()} for sample in samples], path)
    data: list[dict[str, Tensor]] = torch.load(path)
    return data


def collate(samples: list[dict[str, Tensor]], ids: dict[str, int]) -> dict[str, Tensor]:
    """What the model takes: source_ids, source_mask, decoder_input_ids, or input_ids for rows; and labels [B,T]."""
    if "text" in samples[0]:
        rows = torch.stack([sample["text"] for sample in samples])
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}
    sources = pad_sequence([sample["source"] for sample in samples], batch_first=True, padding_value=ids["pad"])
    labels = pad_sequence([sample["target"] for sample in samples], batch_first=True, padding_value=IGNORE)
    begun = F.pad(labels.masked_fill(labels == IGNORE, ids["pad"])[:, :-1], (1, 0), value=ids["bos"])
    return {"source_ids": sources, "source_mask": sources != ids["pad"], "decoder_input_ids": begun, "labels": labels}


def batches(spec: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """This rank's share of every global batch, in a new random order each epoch, without end."""
    data, size, ranks = make_data(spec), spec["batch"], spec["ranks"]
    shuffle = torch.Generator().manual_seed(spec["seed"])
    while True:
        order = torch.randperm(len(data), generator=shuffle).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield collate([data[place] for place in order[start + rank() : start + size : ranks]], spec["ids"])


def shape_of(spec: dict[str, Any]) -> Any:
    """The trainer's model of the lap's shape."""
    from trainer.models.decoder import Decoder
    from trainer.models.encoder_decoder import EncoderDecoder

    same = {"vocab_size": spec["vocab_size"], "max_positions": spec["max_length"], "tie_embeddings": True}
    if spec["kind"] == "packed":
        return Decoder(**same, **spec["model"])
    marian: dict[str, Any] = {"norm_position": "post", "norm_eps": 1e-5, "activation": "silu"}
    return EncoderDecoder(**same, **spec["model"], **marian, positions="sinusoidal_halves")


class Masters:
    """fp32 copies of a model's bf16 parameters, and the update through them."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self._parameters = list(model.parameters())
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self._parameters]
        model.bfloat16()
        same = {key: settings[key] for key in ("lr", "eps")}
        decaying = [m for m in self.masters if m.dim() > 1]
        others = {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0}
        decay = {"params": decaying, "weight_decay": settings["weight_decay"]}
        self.optimizer = torch.optim.AdamW([decay, others], betas=tuple(settings["betas"]), fused=True, **same)
        warmup = settings["warmup"]
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(step, warmup))
        self._clip = settings["clip_norm"]

    def update(self) -> None:
        """One step with the gradients that the parameters have."""
        for master, parameter in zip(self.masters, self._parameters, strict=True):
            assert parameter.grad is not None, "every parameter is used"
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, self._clip, foreach=True)
        self.optimizer.step()
        self._schedule.step()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self.masters)


def main() -> None:
    """Train until ended."""
    spec = read_spec()
    events = Events(spec["out"])
    events.write("start", pid=os.getpid())
    ranks = spec["ranks"]
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(spec["seed"] * 1000 + rank())
    model = shape_of(spec).train()
    model.reset_parameters(torch.Generator().manual_seed(spec["seed"]))
    masters = Masters(model, spec["optimizer"])
    forward = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=False) if ranks > 1 else model
    events.write("ready", parameters=sum(parameter.numel() for parameter in model.parameters()))
    for step, batch in enumerate(batches(spec), start=1):
        targets = int((batch["labels"] != IGNORE).sum())
        total = torch.tensor(float(targets))
        if ranks > 1:
            dist.all_reduce(total)
        logits = forward(batch)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")
        (loss * ranks / total).backward()  # DistributedDataParallel averages over ranks
        masters.update()
        cells = batch["labels"].numel() + (batch["source_ids"].numel() if "source_ids" in batch else 0)
        filled = targets + (int(batch["source_mask"].sum()) if "source_mask" in batch else 0)
        events.write("step", step=step, target_tokens=targets, loss=float(loss) / targets, padding=1 - filled / cells)
        if step == spec["save_at"] and rank() == 0:
            path = f"{spec['out']}/checkpoint.pt"
            states = {"model": model.state_dict(), "optimizer": masters.optimizer.state_dict(), "step": step}
            torch.save(states | {"masters": masters.masters}, path)
            events.write("saved", step=step, path=path, bytes=size_of(path))


if __name__ == "__main__":
    main()
