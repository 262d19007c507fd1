"""distill_loss: vectors against rows of a frozen embedding table, as in stage 1 of SSR-Connector."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.case import Candidate, Case, Direction, OpProblem
from benches.registry import kernel_candidates
from mmkernels.ops.distill_loss import distill_loss
from mmkernels.ops.distill_loss.reference import distill_loss as reference

#: A batch of the paper: 12 utterances of about 40 tokens.
BATCH, TOKENS = 12, 40


@dataclass(frozen=True)
class Table:
    """Embeddings of a language model: their number and their width."""

    name: str
    vocabulary: int
    width: int


LLAMA_7B = Table("llama-7b", 32_000, 4096)
BERT_BASE = Table("bert-base", 30_522, 768)


def valid(ids: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device) < counts[:, None]


def published(pred: Tensor, table: Tensor, ids: Tensor, counts: Tensor, cosine_weight: float) -> Tensor:
    """As the paper's code has it: vectors gathered, normalised and masked, then compared one by one."""
    mask = valid(ids, counts)
    target = F.embedding(ids, table)
    squared = F.mse_loss(pred, target, reduction="none").sum(-1)[mask]
    cosine = F.cosine_similarity(F.normalize(pred, dim=-1)[mask], F.normalize(target, dim=-1)[mask], dim=-1)
    return squared.mean() + cosine_weight * (1 - cosine).mean()


def by_dots(pred: Tensor, table: Tensor, ids: Tensor, counts: Tensor, cosine_weight: float) -> Tensor:
    """The best form of a few statements: three scalar products of each token give both distances."""
    h = F.embedding(ids, table)
    zz, zh, hh = (torch.linalg.vecdot(a, b) for a, b in ((pred, pred), (pred, h), (h, h)))
    terms = zz - 2 * zh + hh + cosine_weight * (1 - zh * (zz * hh).rsqrt())
    mask = valid(ids, counts)
    return torch.where(mask, terms, 0.0).sum() / mask.sum()


def fused(pred: Tensor, table: Tensor, ids: Tensor, counts: Tensor, cosine_weight: float) -> Tensor:
    """For torch.compile: the definition, with a mask that needs no size."""
    mask = valid(ids, counts)
    h = F.embedding(ids, table)
    terms = (pred - h).square().sum(-1) + cosine_weight * (1 - F.cosine_similarity(pred, h, dim=-1))
    return torch.where(mask, terms, 0.0).sum() / mask.sum()


def candidates(device: str) -> tuple[Candidate, ...]:
    return (
        *kernel_candidates(distill_loss, device),
        Candidate("eager (SSR)", "papers", published),
        Candidate("eager, dots", "hand_written", by_dots),
        Candidate("torch.compile", "compile", fused),
    )


def _case(table: Table, direction: Direction, device: str, tiny: bool, **options: Any) -> Case:
    batch, tokens = (2, 4) if tiny else (BATCH, TOKENS)
    vocabulary, width = (9, 16) if tiny else (table.vocabulary, table.width)
    vectors = batch * tokens * width
    rows = vectors * torch.float32.itemsize
    # Backward: predictions and rows are read again, and the gradient is written.
    moved = {"forward": 2 * rows, "backward": 3 * rows, "forward_backward": 5 * rows}
    operations = {"forward": 9 * vectors, "backward": 6 * vectors, "forward_backward": 15 * vectors}
    loss = torch.float32.itemsize
    return Case(
        op="distill_loss",
        shape=table.name,
        variant="",
        direction=direction,
        dtype=torch.float32,
        device=device,
        sizes={"B": batch, "M": tokens, "H": width, "V": vocabulary},
        minimum_bytes=moved[direction],
        flops=operations[direction],
        output_bytes=loss if direction == "forward" else loss + rows,
        candidates=candidates(device),
        problem=functools.partial(_problem, batch, tokens, width, vocabulary, direction, device),
        **options,
    )


def _problem(
    batch: int, tokens: int, width: int, vocabulary: int, direction: Direction, device: str
) -> OpProblem:
    """Predictions as near to their embeddings as after some training; all tokens are valid."""
    table = torch.randn(vocabulary, width, device=device)
    ids = torch.randint(vocabulary, (batch, tokens), device=device)
    pred = table[ids] + 0.5 * torch.randn(batch, tokens, width, device=device)
    inputs: dict[str, Any] = {
        "pred": pred.requires_grad_(direction != "forward"),
        "table": table,
        "ids": ids,
        "counts": torch.full((batch,), tokens, device=device),
        "cosine_weight": 5.0,
    }
    return OpProblem(inputs, reference, direction, torch.float32)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    for table in (LLAMA_7B, BERT_BASE):
        large = table is LLAMA_7B
        yield case(table, "forward", headline=large)
        yield case(table, "forward_backward", headline=large)
        if device == "cuda":
            yield case(table, "backward", headline=large)
        elif large:
            yield case(table, "forward_backward", memory="reused")
