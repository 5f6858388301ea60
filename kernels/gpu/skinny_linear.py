"""Linear layers of a few rows at the memory's speed, with what is around them in the same launch.

    program (tile of outputs, split of K): asks for its first weights, then for the rows
        with a norm: adds up the squares of each row; what remains of the norm is done as a row's pieces come by
        walks its weights, several stages in flight
        one split:   sums ─▶ scale, bias, act(gate) * up, residual ─▶ out
        more splits: sums ─▶ workspace; the last to arrive adds them, first split first ─▶ the same epilogue

The tile and the split are fixed by the weight's shape (linear_config.py), so a row's result is the same to
the bit alone and in any crowd of up to 64. Above that the matrix units are the limit, and large tiles take
over. Every program of a product with a norm norms all rows by itself: at few rows that takes less than handing
them over from a kernel of its own, and the bits are that kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.activation import check_activation, gated
from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit, jit_with_runtime, next_power_of_2, tl
from tokenmill.kernels.gpu.linear_config import LinearConfig, linear_config, stages_that_fit, wide_config
from tokenmill.kernels.gpu.matmul_tile import accumulate, channel_scale, tile_of_program
from tokenmill.kernels.gpu.norms import LANES, WARPS, RowNorm, chunks, inverse_rms
from tokenmill.kernels.gpu.overlap import launch_options, prefetch, wait_for_inputs
from tokenmill.kernels.gpu.quantize import QuantizedWeight, form_of, stored

NORM_ROWS = 8
"""Up to so many rows can be normed by the product that reads them."""
NORM_WIDTH = 16
"""Of so many inputs a row that is normed so has to be a multiple."""

_LANES = tl.constexpr(LANES)
_LANE_LINES = tl.constexpr(LANES * 2 // 128)  # cache lines of so many 16-bit weights


@dataclass(frozen=True)
class LinearWorkspace:
    """Partial sums and arrival counters, shared by all linears of a stream; make it once."""

    partial: Tensor  # [floats] float32
    done: Tensor  # [tiles] int32; 0 between launches


def make_linear_workspace(
    device: torch.device, floats: int = 1 << 24, tiles: int = 1 << 16
) -> LinearWorkspace:
    """Room for splits * rows * outputs partial sums (twice that for a gated linear)."""
    return LinearWorkspace(
        torch.empty(floats, dtype=torch.float32, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )


@jit
def _prefetch(
    w_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    first: tl.tensor,
    HALVED: tl.constexpr,
    GATED: tl.constexpr,
    LINES: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Ask for `rows` of the weights from input `first` on, and for the whole of a norm's weights."""
    prefetch(w_ptr, rows, K, first, HALVED, LINES)
    if GATED:
        prefetch(w_ptr, rows + N, K, first, HALVED, LINES)
    for chunk in tl.static_range(CHUNKS):
        prefetch(norm_ptr, tl.arange(0, 1), K, chunk * _LANES, False, _LANE_LINES)


@jit
def _add_splits(
    partial_ptr: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    step: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """The partial sums of all splits, added in order, past the L1 cache."""
    sums = tl.load(partial_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(partial_ptr + split * step + at, mask=inside, other=0.0, cache_modifier=".cg")
    return sums


@jit
def _finish(
    sums: tl.tensor,
    more: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    outputs: tl.tensor,
    N: tl.tensor,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """The sums with their scales and bias, and with ACTIVATION act(sums) * more."""
    if SCALED:
        sums = channel_scale(sums, scale_ptr, outputs, N)
    if BIAS:
        sums += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        if SCALED:
            more = channel_scale(more, scale_ptr + N, outputs, N)
        if BIAS:
            more += tl.load(bias_ptr + N + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
        sums = gated(sums, more, ACTIVATION)
    return sums


@jit_with_runtime("M")
def _linear_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    done_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    norm_ptr: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LINES: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row_tile, output_tile = tile_of_program(BLOCK_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = output_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    if PDL:
        _prefetch(
            w_ptr, norm_ptr, tl.minimum(outputs, N - 1), N, K, split * share, GROUP > 0, ACTIVATION != "",
            LINES, CHUNKS,
        )  # fmt: skip
    wait_for_inputs(PDL)
    x_rows, row_scale = rows, 0.0
    if NORM_ROWS > 0:
        x_rows = tl.arange(0, NORM_ROWS)
        x_at = x_rows.to(tl.int64) * x_stride
        row_scale = inverse_rms(
            x_ptr, x_at, x_ptr, x_at, x_rows < M, K, eps, False, NORM_ROWS, CHUNKS
        )[:, None]  # fmt: skip
    sums, more = accumulate(
        x_ptr, x_rows.to(tl.int64) * x_stride, x_rows < M, w_ptr, scale_ptr, outputs, N, K,
        split * share, tl.minimum((split + 1) * share, K),
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP, STAGES, ACTIVATION != "",
        norm_ptr, row_scale, offset, NORM_ROWS > 0, FORM,
    )  # fmt: skip
    inside = (rows < M)[:, None] & (outputs < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + outputs[None, :]
    last = split == 0
    if SPLITS > 1:
        step = M.to(tl.int64) * N
        tl.store(partial_ptr + split * step + at, sums, mask=inside)
        if ACTIVATION != "":
            tl.store(partial_ptr + (SPLITS + split) * step + at, more, mask=inside)
        tl.debug_barrier()
        counter = done_ptr + row_tile * tl.num_programs(1) + output_tile
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(counter, 0)
            sums = _add_splits(partial_ptr, at, inside, step, SPLITS)
            if ACTIVATION != "":
                more = _add_splits(partial_ptr + SPLITS * step, at, inside, step, SPLITS)
    if last:
        sums = _finish(sums, more, scale_ptr, bias_ptr, outputs, N, SCALED, BIAS, ACTIVATION)
        if RESIDUAL:
            old = residual_ptr + rows.to(tl.int64)[:, None] * residual_stride + outputs[None, :]
            sums += tl.load(old, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=inside)


def _tile_rows(rows: int, dtype: torch.dtype, group: int) -> int:
    """No large tiles in float32, which has no exact matrix unit; int4 takes more room than others."""
    if rows <= 16:
        return 16
    if rows <= 64 or dtype == torch.float32:
        return 32
    return 64 if group else 128


def _check_norm(x: Tensor, config: LinearConfig) -> None:
    """Raise ValueError where a product would take long to norm x, or wouldn't do it to the norm kernel's bits."""
    if x.shape[0] > NORM_ROWS or config.warps != WARPS:
        raise ValueError(f"a product norms {NORM_ROWS} rows at the most, by {WARPS} warps, not {x.shape[0]}")
    if x.shape[1] % NORM_WIDTH or x.stride(0) % NORM_WIDTH:
        # Triton lays other rows out as each kernel's other operands suggest.
        raise ValueError(f"a product norms rows of whole {NORM_WIDTH} inputs, not {list(x.shape)}")


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
    tile_rows: int | None = None,
    out: Tensor | None = None,
    workspace: LinearWorkspace | None = None,
) -> Tensor:
    """x [M, in] times weight [out, in] transposed, plus `bias` [out] and `residual` [M, out]; float32 sums.

    With `activation` the weight is a fused gate and up (gate first, [2 * I, in]) and the result is
    act(gate) * up, [M, I]. With `norm` x is RMS-normed first, to the bit as `rms_norm` does it: at most `NORM_ROWS`
    rows, of a multiple of `NORM_WIDTH` inputs. `out` may be `residual`. The result is rounded once, to x's dtype.
    `tile_rows` 16, 32, 64 or 128 fixes a tile's rows; by default it follows the number of rows, and with it
    the order of a row's sums changes between 64 and 65 rows.
    """
    check_cuda(x)
    data, scale, group = stored(weight)
    if activation is not None:
        check_activation(activation)
    (rows, inputs), outputs = x.shape, data.shape[0] // (1 if activation is None else 2)
    if data.shape[1] * (2 if group else 1) != inputs or not data.is_contiguous():
        raise ValueError(f"a contiguous weight of {inputs} inputs is needed, not {list(data.shape)}")
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    bits = 4 if group else 8 * data.element_size()
    tile_rows = _tile_rows(rows, x.dtype, group) if tile_rows is None else tile_rows
    if tile_rows not in (16, 32, 64, 128):
        raise ValueError(f"tile_rows must be 16, 32, 64 or 128, not {tile_rows}")
    gated = activation is not None
    config = linear_config(outputs, inputs, gated, bits)
    if tile_rows >= 64:
        config = wide_config(tile_rows, gated)
    if norm is not None:
        _check_norm(x, config)
    tiles = ceil_div(rows, tile_rows), ceil_div(outputs, config.block_n)
    block_k = 2 * group or config.block_k
    stages = stages_that_fit(config, block_k, tile_rows * x.element_size(), bits * (2 if gated else 1))
    floats = config.splits * rows * outputs * (1 if activation is None else 2)
    if config.splits == 1:
        workspace = LinearWorkspace(out, out)
    elif workspace is None:
        workspace = make_linear_workspace(x.device, floats, tiles[0] * tiles[1])
    elif workspace.partial.numel() < floats or workspace.done.numel() < tiles[0] * tiles[1]:
        raise ValueError(
            f"the workspace is too small for {floats} partial sums of {tiles[0] * tiles[1]} tiles"
        )
    _linear_kernel[(*tiles, config.splits)](
        x, data, scale, x if bias is None else bias, x if residual is None else residual, out,
        workspace.partial, workspace.done, rows, outputs, inputs, x.stride(0),
        0 if residual is None else residual.stride(0),
        x if norm is None else norm.weight, 0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        BLOCK_M=tile_rows, BLOCK_N=config.block_n, BLOCK_K=block_k,
        GROUP=group, FORM=form_of(weight), STAGES=stages, SPLITS=config.splits, SCALED=data is not weight and not group,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation or "",
        LINES=min(16, next_power_of_2(inputs * bits // (1024 * config.splits))),
        NORM_ROWS=0 if norm is None else 1 if rows == 1 else NORM_ROWS,
        CHUNKS=0 if norm is None else chunks(inputs), num_warps=config.warps,
        **launch_options(),
    )  # fmt: skip
    return out
