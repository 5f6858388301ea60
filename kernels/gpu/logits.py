"""What changes logits before a token is drawn: bias, penalties, grammar masks.

    logits (raw, kept for logprobs) ──bias──penalties──mask──▶ adjusted float32

`adjust_logits` does the three in one pass into another buffer, so that the raw row stays readable; the few
biased entries are computed again afterwards, each from its raw value. The in-place twins of the reference are
here too. A row, line or slot of -1 (padding of a graph's bucket) changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit, jit_with_runtime, tl

_BLOCK = 4096


@dataclass(frozen=True)
class Bias:
    """`values` [n] float32 to add at the distinct pairs (`rows` [n], `tokens` [n]) int64; row -1: none."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True)
class Penalties:
    """The arguments of `apply_penalties` after the logits: persistent lines by slot, settings by row."""

    slots: Tensor  # [N] int64, -1: none
    output_counts: Tensor  # [M, V] int32
    prompt_seen: Tensor  # [M, V] bool
    repetition: Tensor  # [N] float32
    presence: Tensor  # [N] float32
    frequency: Tensor  # [N] float32


@dataclass(frozen=True)
class Mask:
    """Grammar masks: row i obeys line `lines[i]` [N] int64 (-1: none) of `bits` [n, V / 32] int32."""

    lines: Tensor
    bits: Tensor


@jit
def _penalized(
    x: tl.tensor,
    row: tl.tensor,
    slot: tl.tensor,
    tokens: tl.tensor,
    counts_ptr: tl.tensor,
    seen_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    V: tl.tensor,
) -> tl.tensor:
    """float32 x at `tokens` of a row after its penalties; slot -1 has none."""
    used = tokens < tl.where(slot >= 0, V, 0)
    counts = tl.load(counts_ptr + slot * V + tokens, mask=used, other=0)
    seen = tl.load(seen_ptr + slot * V + tokens, mask=used, other=0)
    factor = tl.load(repetition_ptr + row)
    repeated = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
    x = tl.where((counts > 0) | (seen > 0), repeated, x)
    owed = tl.load(frequency_ptr + row) * counts.to(tl.float32)
    return tl.where(counts > 0, x - owed - tl.load(presence_ptr + row), x)


@jit
def _allowed(
    bits_ptr: tl.tensor, line: tl.tensor, words: tl.tensor, tokens: tl.tensor, V: tl.tensor
) -> tl.tensor:
    """Whether a mask's line lets each token pass; line -1 lets all."""
    ruled = tokens < tl.where(line >= 0, V, 0)
    word = tl.load(bits_ptr + line * words + tokens // 32, mask=ruled, other=-1)
    return ((word >> (tokens % 32)) & 1) != 0


@jit
def _adjust_kernel(
    logits_ptr: tl.tensor,
    out_ptr: tl.tensor,
    logits_stride: tl.tensor,
    out_stride: tl.tensor,
    V: tl.tensor,
    slots_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    seen_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    lines_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    words: tl.tensor,
    entry_rows_ptr: tl.tensor,
    entry_tokens_ptr: tl.tensor,
    entry_values_ptr: tl.tensor,
    ENTRIES: tl.constexpr,
    PENALTIES: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A block of a row, or (ENTRIES) one biased entry, through bias, penalties and mask."""
    if ENTRIES:
        row = tl.load(entry_rows_ptr + tl.program_id(0)).to(tl.int64)
        tokens = tl.load(entry_tokens_ptr + tl.program_id(0)) + tl.arange(0, BLOCK)
    else:
        row = tl.program_id(0).to(tl.int64)
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < 0:
        return
    inside = tokens < V
    x = tl.load(logits_ptr + row * logits_stride + tokens, mask=inside, other=0.0).to(tl.float32)
    if ENTRIES:
        x += tl.load(entry_values_ptr + tl.program_id(0))
    if PENALTIES:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        x = _penalized(
            x, row, slot, tokens, counts_ptr, seen_ptr, repetition_ptr, presence_ptr, frequency_ptr, V,
        )  # fmt: skip
    if MASK:
        line = tl.load(lines_ptr + row).to(tl.int64)
        x = tl.where(_allowed(bits_ptr, line, words, tokens, V), x, float("-inf"))
    tl.store(out_ptr + row * out_stride + tokens, x, mask=inside)


def adjust_logits(
    logits: Tensor,
    *,
    bias: Bias | None = None,
    penalties: Penalties | None = None,
    mask: Mask | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Logits [N, V] after bias, penalties and mask, in that order, as float32 in `out` [N, V]."""
    check_cuda(logits)
    rows, width = logits.shape
    if out is None:
        out = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return out
    settings = (logits,) * 6
    if penalties is not None:
        seen = penalties.prompt_seen.view(torch.uint8)
        rates = penalties.repetition, penalties.presence, penalties.frequency
        settings = (penalties.slots, penalties.output_counts, seen, *rates)
    lines, bits = (logits, logits) if mask is None else (mask.lines, mask.bits)
    words = 0 if mask is None else mask.bits.shape[1]
    common = (logits, out, logits.stride(0), out.stride(0), width, *settings, lines, bits, words)
    flags = {"PENALTIES": penalties is not None, "MASK": mask is not None}
    grid = (rows, ceil_div(width, _BLOCK))
    _adjust_kernel[grid](*common, logits, logits, logits, ENTRIES=False, BLOCK=_BLOCK, num_warps=8, **flags)
    if bias is not None and bias.rows.numel():
        _adjust_kernel[(bias.rows.numel(),)](
            *common, bias.rows, bias.tokens, bias.values, ENTRIES=True, BLOCK=1, num_warps=1, **flags
        )
    return out


@jit_with_runtime("n")
def _bias_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    rows_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    values_ptr: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(rows_ptr + entry, mask=entry < n, other=-1).to(tl.int64)
    tokens = tl.load(tokens_ptr + entry, mask=entry < n, other=0)
    values = tl.load(values_ptr + entry, mask=entry < n, other=0.0)
    at = logits_ptr + rows * stride + tokens
    old = tl.load(at, mask=rows >= 0, other=0.0).to(tl.float32)
    tl.store(at, (old + values).to(logits_ptr.dtype.element_ty), mask=rows >= 0)


def apply_logit_bias(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add `values` [n] float32 to logits [N, V] at (`rows`, `tokens`) int64 pairs, which are distinct."""
    check_cuda(logits, rows, tokens, values)
    n = rows.numel()
    if n:
        _bias_kernel[(ceil_div(n, 128),)](
            logits, logits.stride(0), rows, tokens, values, n, BLOCK=128, num_warps=4
        )


def apply_penalties(
    logits: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    prompt_seen: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalise repeated tokens of logits [N, V] float32 in place; see `reference.apply_penalties`."""
    penalties = Penalties(slots, output_counts, prompt_seen, repetition, presence, frequency)
    adjust_logits(logits, penalties=penalties, out=logits)


@jit
def _bitmask_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    rows_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    words: tl.tensor,
    V: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + line).to(tl.int64)
    if row < 0:
        return
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    refused = (tokens < V) & (_allowed(bits_ptr, line, words, tokens, V) == 0)
    dtype = logits_ptr.dtype.element_ty
    tl.store(logits_ptr + row * stride + tokens, tl.full((BLOCK,), float("-inf"), dtype), mask=refused)


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """Set logits[rows[i], t] to -inf where bit t % 32 of bitmask[i, t // 32] (int32) is 0; in place."""
    check_cuda(logits, rows, bitmask)
    if rows.numel():
        grid = (rows.numel(), ceil_div(logits.shape[1], _BLOCK))
        _bitmask_kernel[grid](
            logits,
            logits.stride(0),
            rows,
            bitmask,
            bitmask.shape[1],
            logits.shape[1],
            BLOCK=_BLOCK,
            num_warps=8,
        )
