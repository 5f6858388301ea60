"""The structures of C++ that a tape fills in, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

MAX_BUFFERS = 8


class OpStruct(ctypes.Structure):
    """`Op` of src/tape.cpp."""

    _fields_ = (
        ("kind", c_int32),
        ("input", c_int32),
        ("residual", c_int32),
        ("other", c_int32),
        ("output", c_int32),
        ("picked", c_int32),
        ("activation", c_int32),
        ("input_tiled", c_int32),
        ("tiled", c_int32),
        ("wide", c_int32),
        ("eps", c_float),
        ("factor", c_float),
        ("scale", c_float),
        ("size", c_int64),
        ("left", c_int64),
        ("middle", c_int64),
        ("job", c_void_p),
        ("second", c_void_p),
    )


class StepStruct(ctypes.Structure):
    """`Step` of src/tape.cpp."""

    _fields_ = (
        ("tokens", c_int64),
        ("sequences", c_int64),
        ("table_width", c_int64),
        ("picked", c_int64),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("logits_index", c_void_p),
        ("block_table", c_void_p),
        ("seq_lens", c_void_p),
        ("query_start", c_void_p),
        ("lines", c_void_p),
        *((f"picked_{name}", c_void_p) for name in ("positions", "table", "lens", "start")),
        ("buffers", c_void_p * MAX_BUFFERS),
        ("type", c_int32),
    )


class RopeStruct(ctypes.Structure):
    """`Rope` of src/rope.h; what a step brings is left empty."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("qkv", "cos", "sin", "positions", "slots", "k_cache", "v_cache", "query")
        ),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        *(
            (name, c_int64)
            for name in ("tokens", "heads", "kv_heads", "size", "value_size", "half", "block_size")
        ),
        ("eps", c_float),
        ("offset", c_float),
        ("interleaved", c_int32),
        ("value_norm", c_int32),
        ("type", c_int32),
    )


class AttentionStruct(ctypes.Structure):
    """`Attention` of src/attention.h; what a step brings is left empty."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "k_cache", "v_cache", "out", "block_table", "seq_lens")),
        *((name, c_void_p) for name in ("query_start", "sinks")),
        *((name, c_int64) for name in ("sequences", "table_width", "heads", "kv_heads", "block_size")),
        *((name, c_int64) for name in ("key_size", "value_size", "window")),
        ("scale", c_float),
        ("softcap", c_float),
        ("type", c_int32),
        ("tiled", c_int32),
    )
