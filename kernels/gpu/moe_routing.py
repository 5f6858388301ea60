"""Which experts a token goes to, and its (token, expert) pairs laid out expert by expert in whole tiles.

    pairs (token * k + rank):   0 1 | 2 3 | 4 5          experts 3 1 | 1 0 | 3 1
    tiles of 4, by expert:      e0: 3 · · ·   e1: 1 2 5 ·   e3: 0 4 · ·

Pairs of an expert keep their order, so the layout is a function of the routing alone. Nothing is read back:
the number of tiles stays on the device, and a grid covers the most there can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import check_cuda, jit, jit_with_runtime, next_power_of_2, tl
from tokenmill.kernels.gpu.logprobs import next_best
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs
from tokenmill.kernels.reference import Routing

_PAIRS = tl.constexpr(1024)


@jit
def _in_best_groups(
    worth: tl.tensor,
    experts: tl.tensor,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
) -> tl.tensor:
    """`worth` [BLOCK_X] of the experts in the TOP_GROUPS groups whose two best are most together; else -inf."""
    groups = tl.arange(0, BLOCK_GROUPS)
    totals = tl.full((BLOCK_GROUPS,), float("-inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        inside = experts // SIZE == group
        total = tl.max(tl.where(inside, worth, float("-inf")), axis=0)
        if SIZE > 1:
            first = tl.min(tl.where(inside & (worth == total), experts, GROUPS * SIZE), axis=0)
            total += tl.max(tl.where(inside & (experts != first), worth, float("-inf")), axis=0)
        totals = tl.where(groups == group, total, totals)
    candidates = tl.where(groups < GROUPS, groups, -1)
    last, last_group = tl.max(totals, axis=0) * 0 + float("inf"), tl.program_id(0) * 0 - 1
    kept = experts < 0
    for _ in tl.static_range(TOP_GROUPS):
        last, last_group = next_best(totals, candidates, last, last_group)
        kept |= experts // SIZE == last_group
    return tl.where(kept, worth, float("-inf"))


@jit
def _route_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    bias_ptr: tl.tensor,
    gains_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    X: tl.tensor,
    scale: tl.tensor,
    TOP: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_X: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    GAINS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_X)
    x = tl.load(logits_ptr + token * stride + experts, mask=experts < X, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        raised = tl.exp(x - tl.max(x, axis=0))
        scores = raised / tl.sum(raised, axis=0)
    worth = x
    if BIAS or GROUPS > 1:
        worth = tl.where(experts < X, scores, float("-inf"))
    if BIAS:
        worth += tl.load(bias_ptr + experts, mask=experts < X, other=0.0).to(tl.float32)
    if GROUPS > 1:
        worth = _in_best_groups(worth, experts, SIZE, GROUPS, BLOCK_GROUPS, TOP_GROUPS)
    candidates = tl.where(experts < X, experts, -1)
    active = token >= 0
    if SLOTS:
        active = tl.load(slots_ptr + token) >= 0
    last, last_id = tl.where(token >= 0, float("inf"), 0.0), tl.program_id(0) * 0 - 1
    ranks = tl.arange(0, BLOCK_TOP)
    weights = tl.zeros((BLOCK_TOP,), tl.float32)
    gains = tl.full((BLOCK_TOP,), 1.0, tl.float32)
    for rank in tl.static_range(TOP):
        last, last_id = next_best(worth, candidates, last, last_id)
        expert = tl.minimum(last_id, X - 1)
        score = tl.sum(tl.where(experts == expert, scores, 0.0), axis=0)
        weights = tl.where(ranks == rank, score, weights)
        if GAINS:
            gains = tl.where(ranks == rank, tl.load(gains_ptr + expert).to(tl.float32), gains)
        tl.store(ids_ptr + token * TOP + rank, tl.where(active, expert, -1))
    if RENORMALIZE:
        weights /= tl.sum(weights, axis=0)
    weights *= scale * gains
    tl.store(weights_ptr + token * TOP + ranks, tl.where(active, weights, 0.0), mask=ranks < TOP)


def _check_routing(routing: Routing, experts: int) -> None:
    """Raise ValueError where `experts` can't be chosen from so."""
    if not 1 <= routing.top <= experts:
        raise ValueError(f"top must be from 1 to {experts}, not {routing.top}")
    if experts % routing.groups or not 1 <= routing.top_groups <= routing.groups:
        raise ValueError(
            f"{experts} experts aren't chosen from {routing.top_groups} of {routing.groups} groups"
        )
    for name, part in (("bias", routing.bias), ("gains", routing.gains)):
        if part is not None and (part.shape != (experts,) or not part.is_contiguous()):
            raise ValueError(f"the {name} of {experts} experts is needed, not {list(part.shape)}")


def route(logits: Tensor, routing: Routing, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token from router logits [T, X]: (ids [T, top] int32, weights [T, top] float32).

    Best first, equal ones by rising id. A token whose `slots` [T] int64 entry is -1 is padding: its ids are -1 and
    no expert runs for it.
    """
    check_cuda(logits)
    (tokens, experts), top = logits.shape, routing.top
    _check_routing(routing, experts)
    bias, gains, groups = routing.bias, routing.gains, routing.groups
    ids = torch.empty(tokens, top, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top, dtype=torch.float32, device=logits.device)
    if tokens:
        _route_kernel[(tokens,)](
            logits, logits.stride(0), logits if bias is None else bias, logits if gains is None else gains,
            logits if slots is None else slots, ids, weights, experts, routing.scale,
            TOP=top, BLOCK_TOP=next_power_of_2(top), BLOCK_X=max(16, next_power_of_2(experts)),
            SIGMOID=routing.scoring == "sigmoid", BIAS=bias is not None, GAINS=gains is not None,
            SIZE=experts // groups, GROUPS=groups, BLOCK_GROUPS=next_power_of_2(groups), TOP_GROUPS=routing.top_groups,
            RENORMALIZE=routing.renormalize, SLOTS=slots is not None, num_warps=1,
            **launch_options(),
        )  # fmt: skip
    return ids, weights


@dataclass(frozen=True)
class ExpertTiles:
    """Pairs by expert: `pairs` [tiles * rows] int32 (-1: none), each tile's expert, the number of tiles."""

    pairs: Tensor
    experts: Tensor  # [tiles] int32
    count: Tensor  # [1] int32
    rows: int


@jit_with_runtime("pairs")
def _count_kernel(ids_ptr: tl.tensor, counts_ptr: tl.tensor, pairs: tl.tensor, PDL: tl.constexpr) -> None:
    wait_for_inputs(PDL)
    expert = tl.program_id(0)
    found = tl.zeros((_PAIRS,), tl.int32)
    for start in range(0, pairs, _PAIRS):
        at = start + tl.arange(0, _PAIRS)
        found += (tl.load(ids_ptr + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, axis=0))


@jit_with_runtime("pairs")
def _lay_out_kernel(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    count_ptr: tl.tensor,
    pairs: tl.tensor,
    X: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program an expert: its tiles follow those of the experts before it."""
    wait_for_inputs(PDL)
    expert = tl.program_id(0)
    every = tl.arange(0, BLOCK_X)
    tiles = tl.cdiv(tl.load(counts_ptr + every, mask=every < X, other=0), ROWS)
    first = tl.sum(tl.where(every < expert, tiles, 0), axis=0)
    mine = tl.sum(tl.where(every == expert, tiles, 0), axis=0)
    if expert == 0:
        tl.store(count_ptr, tl.sum(tiles, axis=0))
    for start in range(0, mine, _PAIRS):
        at = start + tl.arange(0, _PAIRS)
        tl.store(experts_ptr + first + at, at * 0 + expert, mask=at < mine)
    found = first * 0
    for start in range(0, pairs, _PAIRS):
        at = start + tl.arange(0, _PAIRS)
        own = tl.load(ids_ptr + at, mask=at < pairs, other=-1) == expert
        place = found + tl.cumsum(own.to(tl.int32), axis=0) - 1
        tl.store(pairs_ptr + first * ROWS + place, at, mask=own)
        found += tl.sum(own.to(tl.int32), axis=0)
    rest = tl.arange(0, ROWS)
    tl.store(pairs_ptr + first * ROWS + found + rest, rest * 0 - 1, mask=found + rest < mine * ROWS)


def lay_out(ids: Tensor, experts: int, rows: int) -> ExpertTiles:
    """The pairs of `ids` [T, top] int32 in tiles of `rows` (a power of two); pairs of id -1 are left out."""
    check_cuda(ids)
    pairs, device = ids.numel(), ids.device
    most = pairs // rows + min(pairs, experts)
    tiles = ExpertTiles(
        torch.empty(most * rows, dtype=torch.int32, device=device),
        torch.empty(most, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        rows,
    )
    if pairs:
        counts = torch.empty(experts, dtype=torch.int32, device=device)
        _count_kernel[(experts,)](ids, counts, pairs, num_warps=4, **launch_options())
        _lay_out_kernel[(experts,)](
            ids, counts, tiles.pairs, tiles.experts, tiles.count, pairs, experts,
            ROWS=rows, BLOCK_X=max(16, next_power_of_2(experts)), num_warps=4,
            **launch_options(),
        )  # fmt: skip
    return tiles
