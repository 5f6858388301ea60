"""Layers that carry a state from token to token; `kernels/recurrent.py` says what each function computes.

    convolution   a program for each token and block of channels. The one of a sequence's first token takes the first
                  K - 1 tokens, and it alone reads and writes the state: no other program could see it half written.
    recurrence    a program for each sequence, head and block of the state's columns, which stay in one warp's registers
                  while it goes through the sequence's tokens: the state is read once and written once.

Nothing of a launch depends on where sequences begin, so that graphs can replay it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.gpu.activation import activate
from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit, jit_with_runtime, next_power_of_2, tl
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs
from tokenmill.kernels.recurrent import NORM_EPS, Conv, GatedNorm, Rows, Rule

CHANNELS = 512
STATE_TILE = 2048
"""Elements of a recurrent state that a program's one warp holds: 64 registers a thread."""
FLAT = 1024
ACTIVATIONS = (None, "silu", "gelu", "gelu_tanh")
"""Of a convolution."""

_SEQUENCES = tl.constexpr(128)


@jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)); the logarithm is Kahan's log1p, exact where exp(x) is small."""
    small = tl.exp(-tl.abs(x))
    more = 1.0 + small
    lost = more == 1.0
    log1p = tl.where(lost, small, tl.log(more) * (small / tl.where(lost, 1.0, more - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@jit
def _sequence_of(
    token: tl.tensor, starts_ptr: tl.tensor, sequences: tl.tensor, EACH: tl.constexpr
) -> tl.tensor:
    """How many sequences end at or before a token: the number of its own."""
    row = 0
    for begin in range(0, sequences, EACH):
        index = begin + tl.arange(0, EACH)
        ends = tl.load(starts_ptr + 1 + index, mask=index < sequences, other=2147483647)
        row += tl.sum((ends <= token).to(tl.int32), axis=0)
    return row


@jit
def _conv_input(
    x_ptr: tl.tensor, at: tl.tensor, mask: tl.tensor, WIDTH: tl.constexpr, GATED: tl.constexpr
) -> tl.tensor:
    """What is convolved, in float32, rounded as the state holds it."""
    value = tl.load(x_ptr + at, mask=mask, other=0.0)
    if GATED:
        other = tl.load(x_ptr + at + 2 * WIDTH, mask=mask, other=0.0)
        value = (value.to(tl.float32) * other.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return value.to(tl.float32)


@jit_with_runtime("sequences", anywhere=("lines_ptr", "lengths_ptr", "starts_ptr"))
def _conv_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    state_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lines_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    sequences: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    KEPT: tl.constexpr = TAPS - 1
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = _sequence_of(token, starts_ptr, sequences, _SEQUENCES)
    if row < sequences:
        first = tl.load(starts_ptr + row).to(tl.int64)
        count = tl.load(starts_ptr + row + 1).to(tl.int64) - first
        leads = token == first
        if leads | (token >= first + KEPT):
            # Tokens are counted from the step's first one; what came before it begins at `oldest`.
            oldest = tl.where(tl.load(lengths_ptr + row) == count, 0, -KEPT)
            held = state_ptr + tl.load(lines_ptr + row) * (KEPT * WIDTH)
            now = token - first
            for last in range(now, now + tl.where(leads, tl.minimum(count, KEPT), 1)):
                found = tl.zeros((BLOCK,), tl.float32)
                if BIAS:
                    found += tl.load(bias_ptr + columns, mask=inside, other=0.0)
                for tap in tl.static_range(TAPS):
                    source = last - KEPT + tap
                    new = columns < tl.where(source >= 0, WIDTH, 0)
                    old = columns < tl.where((source < 0) & (source >= oldest), WIDTH, 0)
                    value = _conv_input(x_ptr, (first + source) * stride + columns, new, WIDTH, GATED)
                    past = tl.load(held + (source + KEPT) * WIDTH + columns, mask=old, other=0.0)
                    weight = tl.load(weight_ptr + tap * WIDTH + columns, mask=inside, other=0.0)
                    found += weight * (value + past.to(tl.float32))
                if ACTIVATION is not None:
                    found = activate(found, ACTIVATION)
                if GATED:
                    gate_at = (first + last) * stride + WIDTH + columns
                    found *= tl.load(x_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
                out_at = (first + last) * WIDTH + columns
                tl.store(out_ptr + out_at, found.to(out_ptr.dtype.element_ty), mask=inside)
            if leads:
                slots, across = tl.arange(0, SLOTS)[:, None], columns[None, :]
                kept = (slots < KEPT) & (across < WIDTH)
                source = count - KEPT + slots
                new, old = kept & (source >= 0), kept & (source < 0) & (source >= oldest)
                value = _conv_input(x_ptr, (first + source) * stride + across, new, WIDTH, GATED)
                past = tl.load(held + (source + KEPT) * WIDTH + across, mask=old, other=0.0)
                # Inputs move to lower slots: all are read before one is written.
                tl.debug_barrier()
                seen = (value + past.to(tl.float32)).to(state_ptr.dtype.element_ty)
                tl.store(held + slots * WIDTH + across, seen, mask=kept)


def causal_conv(x: Tensor, conv: Conv, state: Tensor, rows: Rows) -> Tensor:
    """`recurrent.causal_conv` with the weight the other way round, [K, C]; it and the bias are float32."""
    check_cuda(x, conv.weight, state, *rows)
    if conv.activation not in ACTIVATIONS:
        raise ValueError(f"a convolution's activation must be one of {ACTIVATIONS}, not {conv.activation!r}")
    taps, width = conv.weight.shape
    lines, lengths, starts = rows
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    block = min(CHANNELS, next_power_of_2(width))
    if x.shape[0]:
        _conv_kernel[(x.shape[0], ceil_div(width, block))](
            x, conv.weight, conv.weight if conv.bias is None else conv.bias, state, out, lines, lengths, starts,
            lengths.shape[0], x.stride(0),
            WIDTH=width, TAPS=taps, SLOTS=next_power_of_2(taps - 1), BLOCK=block, BIAS=conv.bias is not None,
            ACTIVATION=conv.activation, GATED=conv.gated, num_warps=4, **launch_options(),
        )  # fmt: skip
    return out


@jit
def _load_token(
    x_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    key_at: tl.tensor,
    key_mask: tl.tensor,
    value_at: tl.tensor,
    value_mask: tl.tensor,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    DELTA: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One head's q, k [D] and v [block of E] of a token, the gate of its step and the one of its strength."""
    query = tl.load(x_ptr + key_at, mask=key_mask, other=0.0).to(tl.float32)
    key = tl.load(x_ptr + KEYS + key_at, mask=key_mask, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + 2 * KEYS + value_at, mask=value_mask, other=0.0).to(tl.float32)
    first = tl.load(gates_ptr)
    if DELTA:
        return query, key, value, tl.load(gates_ptr + HEADS), first
    else:
        return query, key, value, first, first


@jit_with_runtime(anywhere=("lines_ptr", "lengths_ptr", "starts_ptr"))
def _recur_kernel(
    x_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    rate_ptr: tl.tensor,
    step_bias_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    state_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lines_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    stride: tl.tensor,
    gates_stride: tl.tensor,
    strength: tl.tensor,
    least: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DELTA: tl.constexpr,
    SKIP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    head, row = tl.program_id(1), tl.program_id(2)
    first = tl.load(starts_ptr + row).to(tl.int64)
    last = tl.load(starts_ptr + row + 1).to(tl.int64)
    if first < last:
        across, down = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
        value_mask, key_mask = across < E, down < D
        value_at, key_at = head * E + across, head // (HEADS // GROUPS) * D + down
        cell = state_ptr + (tl.load(lines_ptr + row) * HEADS + head) * (D * E)
        cell += down[:, None] * E + across[None, :]
        known = down < tl.where(tl.load(lengths_ptr + row) == last - first, 0, D)
        held = tl.load(cell, mask=known[:, None] & value_mask[None, :], other=0.0)
        rate, step_bias = tl.load(rate_ptr + head), tl.load(step_bias_ptr + head)
        query, key, value, gate, share = _load_token(
            x_ptr + first * stride, gates_ptr + first * gates_stride + head,
            key_at, key_mask, value_at, value_mask, GROUPS * D, HEADS, DELTA,
        )  # fmt: skip
        for token in range(first, last):
            # The next token's values are under way while this one's are worked in.
            after = tl.minimum(token + 1, last - 1)
            next_query, next_key, next_value, next_gate, next_share = _load_token(
                x_ptr + after * stride, gates_ptr + after * gates_stride + head,
                key_at, key_mask, value_at, value_mask, GROUPS * D, HEADS, DELTA,
            )  # fmt: skip
            step = tl.maximum(_softplus(gate + step_bias), least)
            held *= tl.exp(rate * step)
            if DELTA:
                query *= tl.rsqrt(tl.sum(query * query, axis=0) + eps) * scale
                key *= tl.rsqrt(tl.sum(key * key, axis=0) + eps)
                taken = value - tl.sum(held * key[:, None], axis=0)
                taken *= strength / (1.0 + tl.exp(-share))
            else:
                taken = value * step
            held += key[:, None] * taken[None, :]
            read = tl.sum(held * query[:, None], axis=0)
            if SKIP:
                read += tl.load(skip_ptr + head) * value
            out_at = token * (HEADS * E) + value_at
            tl.store(out_ptr + out_at, read.to(out_ptr.dtype.element_ty), mask=value_mask)
            query, key, value, gate, share = next_query, next_key, next_value, next_gate, next_share
        tl.store(cell, held, mask=key_mask[:, None] & value_mask[None, :])


def recur(x: Tensor, gates: Tensor, rule: Rule, state: Tensor, rows: Rows) -> Tensor:
    """`recurrent.recur`."""
    check_cuda(x, gates, rule.rate, state, *rows)
    lines, lengths, starts = rows
    width = rule.heads * rule.value_size
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    block_d = next_power_of_2(rule.key_size)
    block_e = min(max(8, STATE_TILE // block_d), next_power_of_2(rule.value_size))
    if x.shape[0]:
        _recur_kernel[(ceil_div(rule.value_size, block_e), rule.heads, lengths.shape[0])](
            x, gates, rule.rate, rule.step_bias, rule.rate if rule.skip is None else rule.skip, state, out,
            lines, lengths, starts, x.stride(0), gates.stride(0),
            float(rule.strength), float(rule.least), rule.key_size**-0.5, NORM_EPS,
            GROUPS=rule.key_heads, HEADS=rule.heads, D=rule.key_size, E=rule.value_size,
            BLOCK_D=block_d, BLOCK_E=block_e, DELTA=rule.delta, SKIP=rule.skip is not None,
            num_warps=1, **launch_options(),
        )  # fmt: skip
    return out


@jit
def _gated_norm_kernel(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stride: tl.tensor,
    gate_stride: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    inside, columns = lanes < SIZE, part * SIZE + lanes
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = activate(gate, "silu")
    if GATE_FIRST:
        x *= gate
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    if WHOLE:
        x *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        x *= tl.load(weight_ptr + lanes, mask=inside, other=0.0).to(tl.float32)
    if not GATE_FIRST:
        x *= gate
    out_at = row * (tl.num_programs(1) * SIZE) + columns
    tl.store(out_ptr + out_at, x.to(out_ptr.dtype.element_ty), mask=inside)


def gated_norm(x: Tensor, gate: Tensor, norm: GatedNorm) -> Tensor:
    """`recurrent.gated_norm`."""
    check_cuda(x, gate, norm.weight)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block = next_power_of_2(norm.size)
    if rows:
        _gated_norm_kernel[(rows, width // norm.size)](
            x, gate[:, gate.shape[1] - width :], norm.weight, out, x.stride(0), gate.stride(0), norm.eps,
            SIZE=norm.size, BLOCK=block, WHOLE=norm.weight.numel() != norm.size, GATE_FIRST=norm.gate_first,
            num_warps=min(8, max(1, block // 256)), **launch_options(),
        )  # fmt: skip
    return out


@jit
def _gate_mul_kernel(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    gate_stride: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    product = x / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=inside)


def gate_mul(x: Tensor, gate: Tensor) -> Tensor:
    """`recurrent.gate_mul`."""
    check_cuda(x, gate)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _gate_mul_kernel[(rows, ceil_div(width, FLAT))](
            x, gate, out, width, x.stride(0), gate.stride(0), BLOCK=FLAT, num_warps=4, **launch_options()
        )
    return out


@jit_with_runtime(anywhere=("source_ptr", "target_ptr"))
def _copy_states_kernel(
    state_ptr: tl.tensor,
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    elements: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    index = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(state_ptr + tl.load(source_ptr + index) * elements + at, mask=inside)
    tl.store(state_ptr + tl.load(target_ptr + index) * elements + at, value, mask=inside)


def copy_states(state: Tensor, source: Tensor, target: Tensor) -> None:
    """`recurrent.copy_states`."""
    check_cuda(state, source, target)
    elements = state[0].numel()
    if source.shape[0]:
        _copy_states_kernel[(ceil_div(elements, FLAT), source.shape[0])](
            state, source, target, elements, BLOCK=FLAT, num_warps=4, **launch_options()
        )
