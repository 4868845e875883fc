"""Run by every rank of `test_nvme.py`: ZeRO-3 with parameters, masters and optimizer states on a disk, and layers that
are computed again, beside ZeRO-3 in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.engine.nvme_sources import use_sources
from trainer import distributed
from trainer.checkpoint.load import load, newest
from trainer.checkpoint.save import Checkpointer
from trainer.composition import compose
from trainer.config import CheckpointConfig, to_config
from trainer.engine import nvme
from trainer.initial import initialise
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.parallel.layout import make_layout
from trainer.parts import make_engine
from trainer.plan import make_plan
from trainer.state import TrainState
from trainer.tasks import LossSums


def build_model():
    """A matrix of it is not trained."""
    model = EncoderDecoder(4000, d_model=768, encoder_layers=3, decoder_layers=1, dropout=0.0)
    model.encoder[0].self_attention.qkv.weight.requires_grad_(False)
    return model


def loss(model, batch):
    total = model(batch).float().square().sum()
    return LossSums(total, total.detach(), torch.tensor(1), torch.tensor(1))


def make(*words):
    ranks = distributed.world_size()
    words = ["experiment=quickstart", "precision=bf16", *words, f"batch.global_size={ranks}", "batch.micro_size=1"]
    config = to_config(compose(words))
    return make_engine(config, make_plan(config, ranks), build_model, make_layout(1, 1))


def learn(engine, steps):
    found = []
    for step in steps:
        ids = torch.randint(4000, (1, 8), generator=torch.Generator().manual_seed(10 * step + distributed.rank()))
        batch = {"source_ids": ids, "source_mask": torch.ones_like(ids).bool(), "decoder_input_ids": ids}
        engine.forward_backward(SimpleNamespace(loss=loss), batch, 1e-3, last=True)
        found.append(engine.step(1e-3))
    return found


def on_disk(engine):
    return [p for p in engine.module.parameters() if p.ds_tensor.status.name == "NOT_AVAILABLE"]


def evaluated(engine):
    ids = torch.arange(8).view(1, 8)
    with engine.evaluating():
        return engine.model({"source_ids": ids, "source_mask": torch.ones_like(ids).bool(), "decoder_input_ids": ids})


def saved(engine, root, step):
    checkpointer = Checkpointer(root, engine, {}, CheckpointConfig(asynchronous=step == 2), lambda *_: None)
    checkpointer.save(TrainState(step=step), {})
    checkpointer.require()


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


use_sources(Path(sys.argv[2]))
with distributed.process_group(True):
    root = Path(sys.argv[1])
    words = ["engine=zero3_nvme", "engine.offload_parameters=nvme", "engine.recompute=full"]
    swapped = make(*words, f"engine.nvme_path={root}/disk")
    in_memory = make("engine=zero3", "engine.offload_optimizer=cpu")
    for engine in (swapped, in_memory):
        initialise(engine, build_model, seed=0)
        for piece in engine.frozen():
            values = torch.randn(piece.shape, generator=torch.Generator().manual_seed(0))
            piece.fill(values.flatten().to(piece.tensor.dtype) / 50)
    assert learn(swapped, range(2)) == learn(in_memory, range(2))
    assert torch.equal(evaluated(swapped), evaluated(in_memory))
    assert len(on_disk(swapped)) == 6 and not on_disk(in_memory), "large matrices and the embedding"
    assert nvme.parameter_buffers(build_model().bfloat16(), 2)["buffer_count"] < 6, "so they do not stay in memory"
    with nvme.present(on_disk(swapped)[0]) as parameter:
        share = parameter.ds_tensor.clone()
        parameter.ds_tensor.fill_(1)
    with nvme.present(parameter):
        assert parameter.ds_tensor.sum() == parameter.ds_tensor.numel(), "what is written goes to the disk"
        parameter.ds_tensor.copy_(share)
    numel = sum(fragment.tensor.numel() for fragment in swapped.fragments())
    assert sum(flat.numel() for flat in swapped._flats()) < numel / 30, "they are in memory"
    assert bytes_in(root / "disk") > 4 * numel * 0.9
    (root / "saved").mkdir(exist_ok=True)
    saved(swapped, root / "saved", 2)
    saved(swapped, root / "saved", 3)  # the same, written piece by piece
    expected = learn(swapped, range(2, 4))
    for engine in (swapped, in_memory):
        load(newest(root / "saved"), engine)
        assert learn(engine, range(2, 4)) == expected, engine
    print(f"the same: {expected}", flush=True)
    distributed.barrier()
