"""What matmuls share: which tile a program takes, and the inner loop of a few rows times a stream of weights.

Weights [out, in] are read once, in whole lines, several stages ahead; the few rows ride along in the matrix
unit's 16. K is walked in one order that the weight's shape fixes, so a row's sums are the same among 1 or 16.
Rows may be normed as they come by: a norm's factor for each row is known before, the rest is done at every step.
"""

from __future__ import annotations

from tokenmill.kernels.gpu.jit import as_operand, dot, jit, tl
from tokenmill.kernels.gpu.norms import normalized
from tokenmill.kernels.gpu.quantize import FLOATS, WITH_MINIMA

_FLOATS, _WITH_MINIMA = tl.constexpr(FLOATS), tl.constexpr(WITH_MINIMA)


@jit
def tile_of_program(BLOCK_M: tl.constexpr) -> tl.tensor:
    """(tile of rows, tile of outputs) of this program; tall tiles in an order that reads weights once."""
    row_tile, output_tile = tl.program_id(0), tl.program_id(1)
    if BLOCK_M > 32:
        # Eight tiles of weights stay in the L2 cache while all rows pass.
        output_tile, row_tile = tl.swizzle2d(output_tile, row_tile, tl.num_programs(1), tl.num_programs(0), 8)
    return row_tile, output_tile


@jit
def _load_rows(
    x_ptr: tl.tensor,
    x_at: tl.tensor,
    real: tl.tensor,
    k: tl.tensor,
    K: tl.tensor,
    norm_ptr: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """x[:, k] [BLOCK_M, ...] of the rows at offsets `x_at`.

    With NORM there may be fewer of them, [R, 1]: each is multiplied by its `scale` and by (offset + the norm's
    weight), and they are repeated to fill the matrix unit's rows, which costs less than norming rows of zeros.
    """
    x = tl.load(x_ptr + x_at + k[None, :], mask=real & (k < K)[None, :], other=0.0)
    if NORM:
        weight = tl.load(norm_ptr + k, mask=k < K, other=0.0)
        x = normalized(x, scale, weight[None, :], offset, x.dtype)
        x = tl.broadcast_to(x[None, :, :], (BLOCK_M // x.shape[0], x.shape[0], x.shape[1]))
        x = tl.reshape(x, (BLOCK_M, x.shape[2]))
    return x


@jit
def _times_block(
    x: tl.tensor,
    w_ptr: tl.tensor,
    w_at: tl.tensor,
    valid: tl.tensor,
    k: tl.tensor,
    K: tl.tensor,
    accumulator: tl.tensor,
    POLICY: tl.constexpr,
) -> tl.tensor:
    """accumulator + x w[:, k]^T for inputs `k` [BLOCK_K] of the weights at offsets `w_at` [N, 1]."""
    w_at = w_ptr + w_at + k[None, :]
    w = tl.load(w_at, mask=valid & (k < K)[None, :], other=0.0, eviction_policy=POLICY)
    return dot(x, tl.trans(as_operand(w, x.dtype)), accumulator)


@jit
def _four_bits(codes: tl.tensor, like: tl.tensor, FORM: tl.constexpr) -> tl.tensor:
    """What codes of 4 bits stand for, as an operand for `like`: integers, or twice the 4-bit floats that they are."""
    if FORM == _FLOATS:
        # Eight nibbles: twice the magnitude of each of a float's lower three bits.
        table = tl.full((1, 1), -0x379BCDF0, tl.int32)  # 0xC8643210
        wide = codes.to(tl.int32)
        size = (table >> ((wide & 7) * 4)) & 15
        return as_operand(tl.where(wide > 7, -size, size).to(tl.int8), like.dtype)
    return as_operand(codes.to(tl.int8) - 8, like.dtype)


@jit
def _minima(x: tl.tensor, scale_ptr: tl.tensor, at: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """What a group's minima add to sums of rows `x` [M, GROUP]."""
    minimum = tl.load(scale_ptr + at, mask=valid, other=0.0)
    return tl.sum(x.to(tl.float32), axis=1)[:, None] * tl.trans(minimum)


@jit
def _times_int4_block(
    low: tl.tensor,
    high: tl.tensor,
    w_ptr: tl.tensor,
    w_at: tl.tensor,
    scale_ptr: tl.tensor,
    scale_at: tl.tensor,
    valid: tl.tensor,
    start: tl.tensor,
    accumulator: tl.tensor,
    K: tl.tensor,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    POLICY: tl.constexpr,
) -> tl.tensor:
    """accumulator + x w^T over the two groups of inputs from `start` on, which are all there."""
    w_at = w_ptr + w_at + start // 2 + tl.arange(0, GROUP)[None, :]
    packed = tl.load(w_at, mask=valid, other=0x88, eviction_policy=POLICY)
    low_scale = tl.load(scale_ptr + scale_at + start // GROUP, mask=valid, other=0.0)
    high_scale = tl.load(scale_ptr + scale_at + start // GROUP + 1, mask=valid, other=0.0)
    zero = tl.zeros(accumulator.shape, tl.float32)
    codes = _four_bits(packed & 15, low, FORM)
    accumulator += dot(low, tl.trans(codes), zero) * tl.trans(low_scale)
    codes = _four_bits(packed >> 4, low, FORM)
    accumulator += dot(high, tl.trans(codes), zero) * tl.trans(high_scale)
    if FORM == _WITH_MINIMA:
        minima_at = scale_at + (K + start) // GROUP
        accumulator += _minima(low, scale_ptr, minima_at, valid)
        accumulator += _minima(high, scale_ptr, minima_at + 1, valid)
    return accumulator


@jit
def accumulate(
    x_ptr: tl.tensor,
    x_at: tl.tensor,
    real: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    outputs: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    norm_ptr: tl.tensor = None,
    row_scale: tl.tensor = None,
    offset: tl.tensor = None,
    NORM: tl.constexpr = False,
    FORM: tl.constexpr = 0,
) -> tl.tensor:
    """x w^T over the inputs `first` .. `last`, for `outputs` [BLOCK_N] and, if GATED, for outputs + N.

    `x_at` [BLOCK_M] are element offsets of the rows, `real` says which of them exist. GROUP > 0: the weight is in 4
    bits, of a FORM of quantize.py, and BLOCK_K two groups. With NORM x is normed first, by the factors `row_scale`
    [R, 1] and the weights at `norm_ptr`, and R rows are given, which divide BLOCK_M: row r of the sums is row r mod R.
    Returns (sums, sums of the second half).
    """
    x_at, real = x_at[:, None], real[:, None]
    valid = (outputs < N)[:, None]
    line = outputs.to(tl.int64)[:, None]
    # Few rows read each weight once: it shouldn't push the activations out of the L2 cache.
    POLICY: tl.constexpr = "evict_first" if BLOCK_M <= 32 else ""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    more = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        if GROUP > 0:
            PARTS: tl.constexpr = 2 if FORM == _WITH_MINIMA else 1
            k, scale_at = start + tl.arange(0, GROUP), line * (PARTS * (K // GROUP))
            low = _load_rows(x_ptr, x_at, real, k, K, norm_ptr, row_scale, offset, NORM, BLOCK_M)
            high = _load_rows(x_ptr, x_at, real, k + GROUP, K, norm_ptr, row_scale, offset, NORM, BLOCK_M)
            sums = _times_int4_block(
                low,
                high,
                w_ptr,
                line * (K // 2),
                scale_ptr,
                scale_at,
                valid,
                start,
                sums,
                K,
                GROUP,
                FORM,
                POLICY,
            )
            if GATED:
                more = _times_int4_block(
                    low, high, w_ptr, (line + N) * (K // 2), scale_ptr, (line + N) * (PARTS * (K // GROUP)), valid,
                    start, more, K, GROUP, FORM, POLICY,
                )  # fmt: skip
        else:
            k = start + tl.arange(0, BLOCK_K)
            x = _load_rows(x_ptr, x_at, real, k, K, norm_ptr, row_scale, offset, NORM, BLOCK_M)
            sums = _times_block(x, w_ptr, line * K, valid, k, K, sums, POLICY)
            if GATED:
                more = _times_block(x, w_ptr, (line + N) * K, valid, k, K, more, POLICY)
    return sums, more


@jit
def channel_scale(sums: tl.tensor, scale_ptr: tl.tensor, outputs: tl.tensor, N: tl.tensor) -> tl.tensor:
    """sums [M, BLOCK_N] times the scales of its outputs."""
    return sums * tl.load(scale_ptr + outputs, mask=outputs < N, other=0.0)[None, :]
