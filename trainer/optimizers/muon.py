"""Muon for the matrices of layers, AdamW for all else (Jordan et al. 2024, "Muon: an optimizer for hidden layers")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` under one roof, with one learning rate and one weight decay.

    The momentum of a matrix is orthogonalised by Newton-Schulz iterations before it is applied; with
    adjust_lr_fn="match_rms_adamw" (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2) its update is as
    large as AdamW's, so that one learning rate serves both. Vectors, tensors of more than two dimensions, and matrices
    whose name has a part of `adamw_for` as a dotted component (embeddings, output heads) go to AdamW with `betas` and
    `eps`. A matrix is orthogonalised as a whole, so a shard of it cannot be updated by itself.
    """

    def __init__(
        self,
        params: Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: Sequence[float] = (0.9, 0.98),
        eps: float = 1e-8,
        adamw_for: Sequence[str] = ("embedding", "head"),
    ) -> None:
        """params: groups of (name, parameter), each with its weight_decay. Raises ValueError for impossible options."""
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in params:
            hidden = [(n, p) for n, p in group["params"] if p.dim() == 2 and not {*n.split(".")} & {*adamw_for}]
            names = {name for name, _ in hidden}
            rest = [(name, parameter) for name, parameter in group["params"] if name not in names]
            matrices += [{**group, "params": hidden}] if hidden else []
            others += [{**group, "params": rest}] if rest else []
        self._inner: list[torch.optim.Optimizer] = []
        if matrices:
            options: dict[str, Any] = {"nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
            self._inner.append(torch.optim.Muon(matrices, lr, weight_decay, momentum, **options))
        if others:
            first, second = betas
            self._inner.append(torch.optim.AdamW(others, lr, (first, second), eps, weight_decay, fused=True))
        super().__init__([group for one in self._inner for group in one.param_groups], {})
        for one in self._inner:
            one.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of each; `closure` is not used."""
        for one in self._inner:
            one.step()
