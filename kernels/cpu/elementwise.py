"""The passes between matrix products on the CPU: twins of `kernels/reference.py`, and fused ones.

Everything is computed in float32 and rounded once, at the end of a pass.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from tokenmill.kernels.cpu.library import ACTIVATIONS, check, required, type_of

_ROPE = struct.Struct("@10P7qffiii")
"""`Rope` of src/rope.h."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm over the last dimension in float32, times (offset + weight); result in x's type.

    `weight` [size] has x's type; x is contiguous.
    """
    size = x.shape[-1]
    check(x, "x", tuple(x.shape))
    check(weight, "weight", (size,), x.dtype)
    normed = torch.empty_like(x)
    required().tm_rms_norm(
        *(x.data_ptr(), None, weight.data_ptr(), None, normed.data_ptr()),
        *(x.numel() // max(size, 1), size, eps, offset, type_of(x), False),
    )
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """residual + x, rounded to its type, and the RMS norm of that sum: (normed, sum)."""
    size = x.shape[-1]
    check(x, "x", tuple(x.shape))
    check(residual, "residual", tuple(x.shape), x.dtype)
    check(weight, "weight", (size,), x.dtype)
    normed, total = torch.empty_like(x), torch.empty_like(x)
    required().tm_rms_norm(
        *(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), total.data_ptr(), normed.data_ptr()),
        *(x.numel() // max(size, 1), size, eps, offset, type_of(x), False),
    )
    return normed, total


def norm_add(
    x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor, scale: float = 1.0
) -> Tensor:
    """(residual + RMS norm of x) * scale; a `weight` shorter than rows norms each of their groups by itself."""
    size = check_groups(x.shape[-1], weight, x.dtype)
    check(x, "x", tuple(x.shape))
    check(residual, "residual", tuple(x.shape), x.dtype)
    out = torch.empty_like(x)
    required().tm_norm_add(
        *(x.data_ptr(), weight.data_ptr(), residual.data_ptr(), out.data_ptr()),
        *(x.numel() // size, size, eps, offset, scale, type_of(x)),
    )
    return out


def check_groups(width: int, weight: Tensor, dtype: torch.dtype) -> int:
    """Elements of a norm by `weight`, of which rows of `width` hold a whole number."""
    size = weight.numel()
    check(weight, "weight", (size,), dtype)
    if not size or width % size:
        raise ValueError(f"rows of {width} aren't groups of {size}")
    return size


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension in float32; weight and bias [size] have x's type."""
    size = x.shape[-1]
    check(x, "x", tuple(x.shape))
    check(weight, "weight", (size,), x.dtype)
    if bias is not None:
        check(bias, "bias", (size,), x.dtype)
    normed = torch.empty_like(x)
    required().tm_layer_norm(
        *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), normed.data_ptr()),
        *(x.numel() // max(size, 1), size, eps, type_of(x)),
    )
    return normed


def rope_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    heads: int,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    value_norm: bool = False,
    stores: bool = True,
) -> Tensor:
    """Norm, RoPE and KV store of qkv [T, H*D + G*D + G*E] in one pass; returns the queries [T, H, D].

    `cos`, `sin` are tables [context, W] float32 read at `positions` [T] int64, or rows [T, W] when that is
    None; without them nothing turns. `q_weight`, `k_weight` [D] ask for an RMS norm of each head before it.
    `value_norm` asks for one of each value head, without a weight. Unless a layer `stores`, its rows hold queries
    alone. A negative slot stores nothing. Raises ValueError for shapes or types that don't fit together.
    """
    blocks, held, block_size, size = k_cache.shape
    kv_heads, value_size, tokens = held if stores else 0, v_cache.shape[3], qkv.shape[0]
    check(qkv, "qkv", (tokens, (heads + kv_heads) * size + kv_heads * value_size))
    check(slots, "slots", (tokens,), torch.int64)
    check(k_cache, "k_cache", (blocks, held, block_size, size), qkv.dtype)
    check(v_cache, "v_cache", (blocks, held, block_size, value_size), qkv.dtype)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check(weight, name, (size,), qkv.dtype)
    half = _check_angles(cos, sin, positions, tokens, size)
    query = torch.empty(tokens, heads, size, dtype=qkv.dtype)
    required().tm_rope_store(
        _ROPE.pack(
            *(0 if part is None else part.data_ptr() for part in (qkv, cos, sin, positions, slots)),
            *(k_cache.data_ptr(), v_cache.data_ptr(), query.data_ptr()),
            *(0 if weight is None else weight.data_ptr() for weight in (q_weight, k_weight)),
            *(tokens, heads, kv_heads, size, value_size, half, block_size),
            *(eps, norm_offset, interleaved, value_norm, type_of(qkv)),
        )
    )
    return query


def _check_angles(
    cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, tokens: int, size: int
) -> int:
    """How many pairs turn."""
    if cos is None or sin is None:
        return 0
    rows, half = cos.shape
    check(cos, "cos", (tokens if positions is None else rows, half), torch.float32)
    check(sin, "sin", (rows, half), torch.float32)
    if positions is not None:
        check(positions, "positions", (tokens,), torch.int64)
    if 2 * half > size:
        raise ValueError(f"{2 * half} rotary dimensions don't fit heads of {size}")
    return half


def activation_mul(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up for gate_up [T, 2 * I] (gate first); `activation`: silu, gelu, gelu_tanh or swiglu_oai."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    check(gate_up, "gate_up", (tokens, 2 * width))
    out = torch.empty(tokens, width, dtype=gate_up.dtype)
    required().tm_activation_mul(
        gate_up.data_ptr(), out.data_ptr(), tokens, width, ACTIVATIONS[activation], type_of(gate_up)
    )
    return out


def act_mul(x: Tensor, other: Tensor, start: int, activation: str) -> Tensor:
    """act(x) * columns `start` and after of `other`, for x [T, W]; silu, gelu or gelu_tanh."""
    tokens, width = x.shape
    check(x, "x", (tokens, width))
    check(other, "other", (tokens, other.shape[1]), x.dtype)
    check_columns(start, width, other.shape[1])
    out = torch.empty_like(x)
    required().tm_act_mul(
        *(x.data_ptr(), other.data_ptr(), out.data_ptr(), tokens, width, start, other.shape[1]),
        *(ACTIVATIONS[activation], type_of(x)),
    )
    return out


def check_columns(start: int, width: int, whole: int) -> None:
    """Raise ValueError where rows of `whole` elements don't hold `width` from `start` on."""
    if not 0 <= start <= whole - width:
        raise ValueError(f"rows of {whole} have no {width} columns from {start} on")


def norm_whole(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Rows [q | k | v] with an RMS norm over q, another over k, each as long as its weight."""
    query, key = q_weight.numel(), k_weight.numel()
    check(qkv, "qkv", tuple(qkv.shape))
    check(q_weight, "q_weight", (query,), qkv.dtype)
    check(k_weight, "k_weight", (key,), qkv.dtype)
    if query + key > qkv.shape[1]:
        raise ValueError(f"rows of {qkv.shape[1]} don't hold {query} of queries and {key} of keys")
    out = torch.empty_like(qkv)
    required().tm_norm_whole(
        *(qkv.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr(), out.data_ptr()),
        *(*qkv.shape, query, key, eps, offset, type_of(qkv)),
    )
    return out


def gate_add(x: Tensor, gate: Tensor, residual: Tensor | None = None) -> Tensor:
    """x [T, W] * sigmoid(gate [T, 1]), plus `residual` [T, W]."""
    check(x, "x", tuple(x.shape))
    check(gate, "gate", (x.shape[0], 1), x.dtype)
    if residual is not None:
        check(residual, "residual", tuple(x.shape), x.dtype)
    out = torch.empty_like(x)
    required().tm_gate_add(
        *(x.data_ptr(), gate.data_ptr(), None if residual is None else residual.data_ptr()),
        *(out.data_ptr(), *x.shape, type_of(x)),
    )
    return out


def activate(x: Tensor, activation: str) -> Tensor:
    """silu, gelu or gelu_tanh of x, computed in float32."""
    check(x, "x", tuple(x.shape))
    out = torch.empty_like(x)
    required().tm_activate(x.data_ptr(), out.data_ptr(), x.numel(), ACTIVATIONS[activation], type_of(x))
    return out


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [n] int64 of table [V, size]; ids must be inside it."""
    check(table, "table", (table.shape[0], table.shape[1]))
    check(ids, "ids", (ids.shape[0],), torch.int64)
    out = torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype)
    row_bytes = table.shape[1] * table.element_size()
    required().tm_gather_rows(table.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.shape[0], row_bytes)
    return out
