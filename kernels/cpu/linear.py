"""Linear layers over weights packed once: `y = act(x W_gate^T) * (x W_up^T)` or `x W^T + bias + residual`.

A row's result is the same bits alone, at any place of any batch, and for any number of threads. The packed
copy (src/packed.h) replaces the weight: `rows()` gives single rows back, for a tied embedding. bfloat16 takes 12 bits
a value there (src/coded.h), to the bit what it was, since decoding waits for memory more than for anything else.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint8, c_void_p

import torch
from torch import Tensor

from tokenmill.kernels.cpu.library import ACTIVATIONS, TYPES, check, required
from tokenmill.kernels.cpu.memory import arena

BFLOAT16, FLOAT32, INT8, INT4, CODED, FLOAT4 = range(6)
_FORMATS = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}

CODED_ON = {"amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2"}
"""Instruction sets whose kernels put coded weights together beside their products."""
EXCEPTION_RATE = 256
"""A weight stays as it is if more than one value in so many isn't among those that the code holds."""


class PackedStruct(ctypes.Structure):
    """`Packed` of src/packed.h."""

    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("format", c_int32),
        ("group", c_int32),
        ("zero_point", c_int32),
        ("minima", c_int32),
        ("activation", c_int32),
        ("unit", c_float),
        ("exceptions", c_void_p),
        ("exception_count", c_int64),
        ("upper", c_uint8 * 16),
    )


class PackedLinear:
    """A weight [out, in], bfloat16 or float32, in tiles, with what follows the product.

    `activation` (silu, gelu, gelu_tanh) says that the weight holds gate rows, then as many up rows; the
    result then is act(gate) * up, [T, out / 2]. `bias` [out] is added before that. Sums are float32.
    """

    saved_bytes = 0
    """How much less it takes than the weight did, though nothing of that is lost."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> None:
        if weight.dtype not in _FORMATS or weight.dim() != 2:
            raise ValueError(
                f"a weight must be bfloat16 or float32 [out, in], not {weight.dtype} {list(weight.shape)}"
            )
        weight = weight.contiguous()
        if not self._pack_coded(weight, activation):
            struct = PackedStruct(format=_FORMATS[weight.dtype], group=32, unit=1.0)
            self._lay_out(struct, weight.shape[0], weight.shape[1], activation)
            required().tm_pack(self._address, weight.data_ptr(), self.data.data_ptr())
        self._set_bias(bias)

    def _pack_coded(self, weight: Tensor, activation: str | None) -> bool:
        """Keep a bfloat16 weight in 12 bits a value, where its exponents allow it and the kernels gain by it."""
        if weight.dtype != torch.bfloat16 or required().isa not in CODED_ON:
            return False
        struct = PackedStruct(format=CODED, group=32, unit=1.0)
        self._lay_out(struct, weight.shape[0], weight.shape[1], activation)
        room = weight.numel() // EXCEPTION_RATE + 1
        exceptions = torch.empty(room, dtype=torch.int64)
        count = required().tm_pack_coded(
            self._address, weight.data_ptr(), self.data.data_ptr(), exceptions.data_ptr(), room
        )
        if count < 0:
            return False
        self._exceptions = exceptions[: count + 1].clone()
        struct.exceptions, struct.exception_count = self._exceptions.data_ptr(), count
        self.saved_bytes = weight.nbytes - self.data.nbytes
        return True

    def _lay_out(self, struct: PackedStruct, outputs: int, inputs: int, activation: str | None) -> None:
        """Fill in the sizes and allocate the packed data."""
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(map(str, ACTIVATIONS))}, not {activation}"
            )
        if activation is not None and outputs % 2:
            raise ValueError(f"gate and up rows must be equally many, {outputs} in all is odd")
        struct.inputs, struct.outputs, struct.activation = inputs, outputs, ACTIVATIONS[activation]
        self.in_features, self.out_features = inputs, outputs // 2 if activation else outputs
        self.activation = activation
        self.struct = struct
        self._address = ctypes.addressof(struct)
        self.data = arena.take(required().tm_packed_bytes(self._address))
        """The packed bytes; the tensor owns them."""
        struct.data = self.data.data_ptr()

    def _set_bias(self, bias: Tensor | None) -> None:
        self.bias: Tensor | None = None
        if bias is not None:
            library = required()
            values = check(bias.float().contiguous(), "bias", (self.struct.outputs,))
            self.bias = torch.empty(library.tm_pairs(self._address) * 32, dtype=torch.float32)
            library.tm_pack_columns(self._address, values.data_ptr(), self.bias.data_ptr())
            self.struct.bias = self.bias.data_ptr()

    @property
    def quantized(self) -> bool:
        """Whether it holds integers and scales."""
        return self.struct.format in (INT8, INT4, FLOAT4)

    @property
    def address(self) -> int:
        """Where its `Packed` structure lies, for as long as this object lives."""
        return self._address

    def __call__(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out_features], plus `residual` of the result's shape and type.

        The result has x's type, or that of `out` (which may be the residual itself). One rounding at the end.
        """
        shape = (x.shape[0], self.out_features)
        if x.shape[1] != self.in_features or not x.is_contiguous():
            raise ValueError(f"x must be contiguous [T, {self.in_features}], not {list(x.shape)}")
        if out is None:
            out = torch.empty(shape, dtype=x.dtype)
        elif out.shape != shape or not out.is_contiguous():
            raise ValueError(f"out must be contiguous {list(shape)}, not {list(out.shape)}")
        added = None
        if residual is not None:
            added = check(residual, "residual", shape, out.dtype).data_ptr()
        required().tm_linear(
            *(self._address, x.data_ptr(), TYPES[x.dtype], False, shape[0]),
            *(added, out.data_ptr(), TYPES[out.dtype], False),
        )
        return out

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows `ids` [n] int64 of the weight, dequantized: [n, in]. Ids must be inside it."""
        out = torch.empty(ids.shape[0], self.in_features, dtype=dtype)
        ids = ids.contiguous()
        required().tm_rows(self._address, ids.data_ptr(), ids.shape[0], out.data_ptr(), TYPES[dtype])
        return out
