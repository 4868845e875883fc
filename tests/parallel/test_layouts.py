"""However a model's matrices and positions are split over ranks, loss and gradients are those of the whole model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.engine.base import Fragment
from trainer.errors import ConfigError
from trainer.models.decoder import Decoder
from trainer.models.encoder import Encoder
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.models.mlp import MLP
from trainer.parallel.layout import Layout, make_layout, members
from trainer.parallel.sequence import own_part, split_positions
from trainer.parallel.slices import of_whole
from trainer.parallel.tensor import split_matrices
from trainer.tasks import IGNORE
from trainer.tasks.loss import cross_entropy_sums, token_loss

RANKS = 4
SPLITS = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]
"""(sequence, tensor) parallel ranks of four."""

MODELS: dict[str, Any] = {
    "transformer": lambda: EncoderDecoder(50, d_model=16, num_heads=4, d_ff=32, encoder_layers=2, decoder_layers=2),
    "t5": lambda: EncoderDecoder(
        50, d_model=16, num_heads=4, d_ff=32, encoder_layers=1, decoder_layers=2, norm="rms", positions="relative",
        activation="geglu", bias=False, tie_embeddings=False, scale_attention=False, scale_embeddings=False,
    ),
    "post_norm": lambda: EncoderDecoder(
        50, d_model=16, num_heads=4, d_ff=32, encoder_layers=1, decoder_layers=1, norm_position="post",
        positions="learned", embedding_norm=True, head_bias=True, scale_embeddings=False, scale_tied_head=False,
    ),
    "decoder": lambda: Decoder(50, d_model=32, num_heads=8, num_kv_heads=4, d_ff=48, num_layers=2),
    "encoder": lambda: Encoder(50, d_model=16, num_heads=4, d_ff=32, num_layers=2, max_positions=12),
    "qwen3": lambda: Decoder(50, d_model=32, num_heads=8, num_kv_heads=4, d_ff=48, num_layers=1, qk_norm=True),
    "gpt2": lambda: Decoder(
        50, d_model=32, num_heads=8, d_ff=48, num_layers=1, max_positions=64, positions="learned", norm="layer",
        activation="gelu_tanh", bias="all", tie_embeddings=True,
    ),
}  # fmt: skip


def batch_of(kind: str, packed: bool, rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """Random ids of odd lengths with padding on the right, or packed rows of two samples and padding."""
    generator = torch.Generator().manual_seed(5)

    def ids(columns: int) -> torch.Tensor:
        return torch.randint(3, 50, (rows, columns), generator=generator)

    def segments(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(columns)
        cut, end = columns // 2, columns - 1
        number = torch.where(at < cut, 1, torch.where(at < end, 2, 0)).expand(rows, columns)
        position = torch.where(at < cut, at, torch.where(at < end, at - cut, 0)).expand(rows, columns)
        return number.contiguous(), position.contiguous()

    sizes = torch.tensor([length, length - 2, 4])[:, None]
    labels = ids(length)
    target_segments, target_positions = segments(length)
    labels[target_segments == 0 if packed else torch.arange(length) >= sizes] = IGNORE
    if kind in ("decoder", "encoder", "qwen3", "gpt2"):
        batch = {"input_ids": ids(length), "attention_mask": labels != IGNORE, "labels": labels}
        return batch | ({"segment_ids": target_segments, "position_ids": target_positions} if packed else {})
    source = ids(length + 2)
    source_segments, source_positions = segments(length + 2)
    mask = source_segments > 0 if packed else torch.arange(length + 2) < sizes + 2
    batch = {"source_ids": source, "source_mask": mask, "decoder_input_ids": ids(length), "labels": labels}
    if packed:
        batch |= {"source_segment_ids": source_segments, "source_position_ids": source_positions}
        batch |= {"target_segment_ids": target_segments, "target_position_ids": target_positions}
    return batch


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    return model.train()


def whole_gradients(kind: str, packed: bool) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss, first values and gradients of the whole model on one process."""
    model = without_dropout(MODELS[kind]())
    model.reset_parameters(torch.Generator().manual_seed(1))
    batch = batch_of(kind, packed)
    sums = cross_entropy_sums(model(batch), batch["labels"], 0.1)
    sums.objective.backward()
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return float(sums.objective), values, {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(rank: int, folder: str, kinds: list[str]) -> None:
    """In each of the processes: every split of every model, packed and not."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    for sequence, tensor in SPLITS:
        layout = make_layout(sequence, tensor)
        for kind, packed in itertools.product(kinds, (False, True)):
            loss, values, gradients = whole_gradients(kind, packed)
            model = without_dropout(MODELS[kind]())
            split_positions(model, layout)
            slices = split_matrices(model, layout)
            for name, parameter in model.named_parameters():
                for piece in of_whole(piece_of(name, parameter.detach()), slices):
                    piece.fill(values[name].flatten())
            batch = own_part(batch_of(kind, packed), layout)
            sums = token_loss(model, batch, 0.1)  # by the head, without whole logits
            sums.objective.backward()
            objective = sums.objective.detach() / layout.tensor / layout.data
            dist.all_reduce(objective)
            what = f"{kind}, packed={packed}, sequence={sequence}, tensor={tensor}"
            assert float(objective) == pytest.approx(loss, rel=1e-5), what
            for name, parameter in model.named_parameters():
                dist.all_reduce(parameter.grad, group=layout.shard_group)
                for piece in of_whole(piece_of(name, parameter.grad / layout.data), slices):
                    expected = piece_of(name, torch.empty_like(piece.tensor), piece)
                    expected.fill(gradients[name].flatten())
                    scale = float(gradients[name].abs().max()) + 1e-3
                    worst = float((piece.tensor - expected.tensor).abs().max()) / scale
                    assert worst < 1e-5, f"{what}: the gradient of {name} differs by {worst:.1e}"
    dist.destroy_process_group()


def piece_of(name: str, values: torch.Tensor, like: Fragment | None = None) -> Fragment:
    if like is not None:
        return Fragment(name, "master", like.start, like.shape, values, like.columns)
    return Fragment(name, "master", 0, tuple(values.shape), values.view(-1))


@pytest.mark.dist
@pytest.mark.parametrize("kinds", [["transformer", "post_norm"], ["t5", "decoder", "encoder", "qwen3", "gpt2"]])
def test_loss_and_gradients_are_those_of_the_whole_model(tmp_path: Path, kinds: list[str]) -> None:
    mp.start_processes(compare, args=(str(tmp_path), kinds), nprocs=RANKS, start_method="forkserver")


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        (Layout(0, 1, 1, 3), MODELS["transformer"], "engine.tensor_parallel=3 .* 4 num_heads"),
        (Layout(0, 1, 3, 1), MODELS["transformer"], "engine.sequence_parallel=3"),
        (Layout(0, 1, 4, 2), MODELS["decoder"], "does not divide the 4 key/value heads"),
        (Layout(0, 1, 1, 2), lambda: MLP(4, 2, [3]), "MLP has no attention to split"),
        (Layout(0, 1, 2, 1), lambda: MLP(4, 2, [3]), "MLP does not split its positions"),
        (Layout(0, 1, 2, 1), lambda: Encoder(9, head="classification", num_classes=2), "does not split its positions"),
    ],
)
def test_what_cannot_be_split_is_refused(layout: Layout, model: Any, message: str) -> None:
    with torch.device("meta"):
        whole = model()
    with pytest.raises(ConfigError, match=message):
        split_positions(whole, layout)
        split_matrices(whole, layout)


def test_places_of_ranks() -> None:
    """Eight ranks, two of each kind: tensor parallel ones are neighbours, then those of a sequence."""
    layouts = [Layout(rank, 2, 2, 2) for rank in range(8)]
    places = [(one.data_rank, one.sequence_rank, one.tensor_rank) for one in layouts]
    assert places == list(itertools.product(range(2), repeat=3))
    assert [one.shard_rank for one in layouts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [one.rank for one in layouts if one.speaks] == [0, 4]


@pytest.mark.parametrize(("sequence", "tensor"), [(1, 2), (2, 1), (2, 2), (3, 4), (1, 24), (24, 1)])
def test_the_members_of_a_ranks_groups_are_those_of_its_place(sequence, tensor):
    for rank in range(24):
        own = Layout(rank, 24 // (sequence * tensor), sequence, tensor)
        every = [Layout(one, own.data, sequence, tensor) for one in range(24)]
        shard, own_sequence, own_tensor = members(rank, 24, sequence, tensor)
        assert list(shard) == [one.rank for one in every if one.tensor_rank == own.tensor_rank]
        same = [one for one in every if one.data_rank == own.data_rank]
        assert list(own_sequence) == [one.rank for one in same if one.tensor_rank == own.tensor_rank]
        assert list(own_tensor) == [one.rank for one in same if one.sequence_rank == own.sequence_rank]
