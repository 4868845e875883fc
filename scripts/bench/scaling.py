"""What the planner predicts from 8 to 16,384 GPUs, and its plots.

    python scripts/bench/scaling.py                     # the tables of docs/scaling.md, and docs/scaling.png
    python scripts/bench/scaling.py cluster=b200 samples=4

Strong: one global batch for every number of GPUs (16 Mi positions, as much as a large run takes), so that each has less
to do; weak: the same number of positions for every GPU. At each point the settings are the fastest that fit, by
`launch.planner.search.choose`, which is held to the batch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.planner.found import Candidate
from launch.planner.search import choose
from trainer.build import part_problems
from trainer.commands import run_command
from trainer.composition import compose
from trainer.config import Config, to_config
from trainer.errors import ConfigError
from trainer.estimate import layout_of, load_cluster

GPUS = (8, 32, 128, 512, 2048, 8192, 16_384)
LANGUAGE = ("task=causal_lm", "data=hub", "data.path=x", "tokenizer.vocab_size=128256", "name=x", "steps=1")
MODELS = {
    "3B encoder-decoder": ("experiment=encoder_decoder_3b_zero3_offload", "engine=zero3"),
    "7B": ("experiment=decoder_7b_zero3",),
    "70B": (*LANGUAGE, "model=llama31_70b", "task.sequence_length=8192"),
    "405B": (*LANGUAGE, "model=llama31_405b", "task.sequence_length=8192"),
}


@dataclass(frozen=True)
class Options:
    """cluster: kind of node; positions: of the global batch of strong scaling; each: of one GPU of weak scaling."""

    cluster: str = "h100"
    positions: int = 2**24
    each: int = 2**14
    plot: str = "docs/scaling.png"


def configured(words: tuple[str, ...]) -> tuple[Config, int]:
    """The configuration, and the positions of one of its samples."""
    config = to_config(compose([*words, "batch={global_size: 8, micro_size: 1, micro_tokens: null}"]), part_problems)
    layout = layout_of(config, 1)
    return config, layout.source_length + layout.target_length


def fastest(config: Config, kind: str, gpus: int, samples: int) -> Candidate | None:
    """On so many GPUs; None where nothing fits, or there are fewer samples than can be divided."""
    cluster = replace(load_cluster(kind), nodes=gpus // 8, gpus_per_node=8)
    try:
        return choose(replace(config, batch=replace(config.batch, global_size=samples)), cluster).best
    except ConfigError:
        return None


def main(options: Options) -> None:
    found: dict[str, dict[str, dict[int, Candidate]]] = {}
    for name, words in MODELS.items():
        config, length = configured(words)
        found[name] = {"strong": {}, "weak": {}}
        for gpus in GPUS:
            sizes = {"strong": options.positions // length, "weak": max(1, gpus * options.each // length)}
            for how, samples in sizes.items():
                if (best := fastest(config, options.cluster, gpus, samples)) is not None:
                    found[name][how][gpus] = best
        for how, points in found[name].items():
            print(f"\n{name}, {how} scaling on {options.cluster}\n")
            print("| GPUs | settings | activations | at once | s a step | tokens/s | MFU | a GPU, of the first | GiB |")
            print("|---|---|---|---|---|---|---|---|---|")
            for gpus, one in points.items():
                print(row(gpus, one, next(iter(points.items()))))
    plot(found, options)


def row(gpus: int, one: Candidate, first: tuple[int, Candidate]) -> str:
    prediction, least = one.prediction, first[1].prediction
    ideal = prediction.tokens_per_second / gpus / (least.tokens_per_second / first[0])
    cells = (f"{gpus:,}", one.arrangement, one.saving, one.micro, f"{one.seconds:.3g}")
    figures = (f"{prediction.tokens_per_second:,.0f}", f"{prediction.mfu:.1%}", f"{ideal:.0%}")
    return "| " + " | ".join((*cells, *figures, f"{prediction.device_bytes.value / 2**30:.0f}")) + " |"


def plot(found: dict[str, dict[str, dict[int, Candidate]]], options: Options) -> None:
    from matplotlib import pyplot

    figure: Any
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, how in zip(axes, ("strong", "weak"), strict=True):
        for name, points in found.items():
            mfu = [one.prediction.mfu for one in points[how].values()]
            axis.plot(list(points[how]), mfu, marker="o", label=name)
        batch = f"{options.positions:,} positions a step" if how == "strong" else f"{options.each:,} positions a GPU"
        axis.set(title=f"{how} scaling: {batch}", xscale="log", xlabel="GPUs", ylim=(0, 0.8))
        axis.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("predicted MFU")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(Path(options.plot), dpi=110)


if __name__ == "__main__":
    sys.exit(run_command(Options, main, __doc__ or ""))
