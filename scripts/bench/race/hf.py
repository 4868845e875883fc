"""Entrants hf and hf_grouped: transformers' Seq2SeqTrainer (pairs) and Trainer (packed), as its examples
run_translation.py and run_clm.py use them: data encoded before (and kept on the disk between runs), padded to the
longest of a batch, bf16=True, use_cpu=True, the default optimizer (adamw_torch_fused). hf_grouped adds
train_sampling_strategy="group_by_length". ZeRO-2: `deepspeed` with the settings of its documentation."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

from common import Events, encoded, read_spec, rows_of, size_of

ZERO2 = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def make_data(spec: dict[str, Any]) -> tuple[Any, Any]:
    """Training and validation data, encoded; from the cache after the first time."""
    from datasets import Dataset, load_from_disk

    made = []
    for split, limit in (("train", None), ("validation", spec["validation_samples"])):
        folder = Path(spec["cache"]) / f"hf_{split}"
        if not folder.exists():
            samples = encoded(spec["data"][split], spec["tokenizer"], spec["ids"]["eos"], limit)
            if spec["kind"] == "packed":
                rows = list(rows_of(samples, spec["max_length"]))
                data = Dataset.from_dict({"input_ids": rows, "labels": rows})
            else:
                data = Dataset.from_list([{"input_ids": s["source"], "labels": s["target"]} for s in samples])
            data.save_to_disk(str(folder))
        made.append(load_from_disk(str(folder)))
    return made[0], made[1]


def count_targets(labels: Any, kind: str) -> int:
    """Labels [B,T] that count: a decoder predicts each token of a row from those before, so the first is no target."""
    return labels.shape[0] * (labels.shape[1] - 1) if kind == "packed" else int((labels != -100).sum())


class Counting:
    """A collator that notes what is in each batch it makes, for the events."""

    def __init__(self, collate: Any, kind: str) -> None:
        self._collate, self.kind = collate, kind
        self.made: deque[tuple[int, float]] = deque()

    def __call__(self, features: list[Any]) -> Any:
        batch = self._collate(features)
        targets, padding = count_targets(batch["labels"], self.kind), 0.0
        if self.kind == "pairs":
            cells = batch["labels"].numel() + batch["input_ids"].numel()
            padding = 1 - (targets + int(batch["attention_mask"].sum())) / cells
        self.made.append((targets, padding))
        return batch


def make_arguments(spec: dict[str, Any]) -> Any:
    """What a user would write for this lap."""
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    settings = spec["optimizer"]
    zero = spec["engine"] == "zero2"
    grouped = {"train_sampling_strategy": "group_by_length"} if spec["entrant"] == "hf_grouped" else {}
    save = spec["save_every"] or spec["save_at"]
    kind = TrainingArguments if spec["kind"] == "packed" else Seq2SeqTrainingArguments
    return kind(
        output_dir=f"{spec['out']}/checkpoints",
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["batch"] // spec["ranks"],
        per_device_eval_batch_size=32,
        bf16=True,
        use_cpu=True,
        seed=spec["seed"],
        learning_rate=settings["lr"],
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_epsilon=settings["eps"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip_norm"],
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=settings["warmup"],
        logging_steps=50,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps" if save else "no",
        save_steps=save or 500,
        save_only_model=bool(spec["save_every"]),
        eval_strategy="steps" if spec["validate_every"] else "no",
        eval_steps=spec["validate_every"] or None,
        ddp_backend="gloo" if spec["ranks"] > 1 else None,
        deepspeed=ZERO2 if zero else None,
        **grouped,
    )


def make_callback(spec: dict[str, Any], events: Events, counting: Counting) -> Any:
    """Tells the events; saves once only where a single step is asked for."""
    from transformers import TrainerCallback

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            import models

            events.write("ready", parameters=models.count(model))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            targets, padding = counting.made.popleft()
            events.write("step", step=state.global_step, target_tokens=targets, padding=padding)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            path = f"{args.output_dir}/checkpoint-{state.global_step}"
            events.write("saved", step=state.global_step, path=path, bytes=size_of(path))
            if spec["save_at"]:
                args.save_strategy = "no"
                control.should_save = False
                state.save_steps = spec["steps"] + 1

    return Told()


def scored(trainer_class: Any, events: Events, counting: Counting) -> Any:
    """The trainer with another evaluation, for its loss is a mean of the means of batches, and the race wants that of
    the tokens."""
    import torch

    class Scored(trainer_class):  # type: ignore[misc]
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            events.write("validating", step=self.state.global_step)
            ahead, total, count = list(counting.made), 0.0, 0
            self.model.eval()
            with torch.no_grad(), self.accelerator.autocast():
                for batch in self.get_eval_dataloader():
                    targets = count_targets(batch["labels"], counting.kind)
                    total, count = total + float(self.model(**batch).loss) * targets, count + targets
            self.model.train()
            counting.made = deque(ahead)
            events.write("validated", step=self.state.global_step, loss=total / count)
            return {"eval_loss": total / count}

    return Scored


def main() -> None:
    """Train until ended, or translate."""
    spec = read_spec()
    if "translate" in spec:
        import models
        from transformers import MarianMTModel

        models.translate(spec, MarianMTModel.from_pretrained(spec["translate"]["checkpoint"]))
        return
    events = Events(spec["out"])
    events.write("start", pid=os.getpid())
    import models
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Trainer, default_data_collator

    train, validation = make_data(spec)
    arguments = make_arguments(spec)  # before the model, as its documentation of DeepSpeed asks
    model = models.build(spec)
    if spec["kind"] == "packed":
        trainer_class, collate = Trainer, default_data_collator
    else:
        trainer_class, collate = Seq2SeqTrainer, DataCollatorForSeq2Seq(models.tokenizer(spec), model=model)
    counting = Counting(collate, spec["kind"])
    trainer = scored(trainer_class, events, counting)(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=counting,
        callbacks=[make_callback(spec, events, counting)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
