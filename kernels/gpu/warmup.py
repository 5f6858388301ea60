"""Compile before the first request: one call of each kernel on dummy tensors, for one model's shapes.

On a GPU that fills Triton's cache on disk; `python -m tokenmill.kernels.gpu.warmup --offline` does the same
for an H200 that isn't there and prints what each kernel takes of it, as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels import gpu
from tokenmill.kernels.gpu.jit import FP8
from tokenmill.kernels.gpu.offline import META, CompiledKernel, compiling_for
from tokenmill.kernels.gpu.overlap import overlapping_launches
from tokenmill.kernels.gpu.quantize import QuantizedWeight
from tokenmill.kernels.gpu.skinny_linear import NORM_ROWS
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rule
from tokenmill.kernels.reference import Routing

Step = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class StateShapes:
    """A kind of layer that carries a state: its convolution's, and its recurrence's where it has `heads`."""

    taps: int = 4
    bias: bool = False
    gated: bool = False
    key_heads: int = 0
    heads: int = 0
    key_size: int = 128
    value_size: int = 128
    delta: bool = True


@dataclass(frozen=True)
class ModelShapes:
    """What the kernels are specialised by; sizes in elements, `batches` the graph buckets of decode."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    value_size: int = 128
    rotary: int = 64
    intermediate: int = 14336
    vocabulary: int = 128256
    activation: str = "silu"
    block: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    logits_dtype: torch.dtype = torch.float32
    windows: tuple[int, ...] = (0,)
    softcap: float = 0.0
    sinks: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    interleaved: bool = False
    experts: int = 0
    experts_per_token: int = 2
    routing: Routing | None = None
    """How experts are chosen, where it isn't the plain way."""
    expert_biases: bool = False
    states: tuple[StateShapes, ...] = ()
    layer_input: int = 0
    """Width of what each layer adds of a token's own; such layers norm values, and may use another's keys."""
    quantization: str | None = None
    batches: tuple[int, ...] = (1, 2, 16, 32, 128)


class _Dummies:
    """Makes tensors of zeros on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def of(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        return self.of(*shape, dtype=torch.float32)

    def ints(self, *shape: int) -> Tensor:
        return self.of(*shape, dtype=torch.int32)

    def longs(self, *shape: int) -> Tensor:
        return self.of(*shape, dtype=torch.int64)

    def weight(self, shapes: ModelShapes, *shape: int) -> Tensor | QuantizedWeight:
        if shapes.quantization is None:
            return self.of(*shape, dtype=shapes.dtype)
        if shapes.quantization == "int4":
            packed = self.of(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
            return QuantizedWeight(packed, self.floats(*shape[:-1], shape[-1] // 64), 64)
        dtype = torch.int8 if shapes.quantization == "int8" else FP8
        return QuantizedWeight(self.of(*shape, dtype=dtype), self.floats(*shape[:-1]), 0)


def _product(x: Tensor, weight: Tensor | QuantizedWeight, **keywords: Any) -> object:
    return gpu.linear(x, weight, **keywords)


def _fp8_product(x: Tensor, weight: QuantizedWeight, **keywords: Any) -> object:
    return gpu.fp8_linear(gpu.quantize_rows(x), weight, **keywords)


def _layer_steps(shapes: ModelShapes, make: _Dummies, rows: int) -> Iterator[Step]:
    """The kernels around attention, for `rows` tokens."""
    x = make.of(rows, shapes.hidden, dtype=shapes.dtype)
    norm = make.of(shapes.hidden, dtype=shapes.dtype)
    yield "rms_norm", lambda: gpu.rms_norm(x, norm, 1e-5, shapes.norm_offset)
    yield "add_rms_norm", lambda: gpu.add_rms_norm(x, x.clone(), norm, 1e-5, shapes.norm_offset)
    yield "norm_add", lambda: gpu.norm_add(x, norm, 1e-5, shapes.norm_offset, x)
    if shapes.layer_input:
        inputs = make.of(rows, 4 * shapes.layer_input, dtype=shapes.dtype)
        gate, part = inputs[:, : shapes.layer_input].contiguous(), norm[: shapes.layer_input]
        yield "act_mul", lambda: gpu.act_mul(gate, inputs, shapes.layer_input, shapes.activation)
        yield "norm_add, layer inputs", lambda: gpu.norm_add(inputs, part, 1e-5, 0.0, inputs, 0.5)
    product: Callable[..., object] = _product
    if shapes.quantization == "fp8_dynamic":
        product = _fp8_product
        yield "rms_norm_rows", lambda: gpu.rms_norm_rows(x, norm, 1e-5, shapes.norm_offset)
    gate_up = make.of(rows, 2 * shapes.intermediate, dtype=shapes.dtype)
    yield "activation_mul", lambda: gpu.activation_mul(gate_up, shapes.activation)
    width = shapes.heads * shapes.size + shapes.kv_heads * (shapes.size + shapes.value_size)
    query_width, inner = shapes.heads * shapes.value_size, shapes.intermediate
    wide = make.of(rows, query_width, dtype=shapes.dtype)
    qkv, out = make.weight(shapes, width, shapes.hidden), make.weight(shapes, shapes.hidden, query_width)
    yield "linear, q/k/v", lambda: product(x, qkv)
    row_norm = gpu.RowNorm(norm, 1e-5, shapes.norm_offset)
    norms = rows <= NORM_ROWS and product is _product
    if norms:
        yield "linear, norm and q/k/v", lambda: product(x, qkv, norm=row_norm)
    yield "linear, output", lambda: product(wide, out, residual=x)
    if shapes.experts:
        router = make.floats(rows, shapes.experts)
        ids, weights = make.ints(rows, shapes.experts_per_token), make.floats(rows, shapes.experts_per_token)
        first = make.weight(shapes, shapes.experts, 2 * inner, shapes.hidden)
        second = make.weight(shapes, shapes.experts, shapes.hidden, inner)
        routing = shapes.routing or Routing(shapes.experts_per_token)
        if shapes.routing is not None:
            each = make.floats(shapes.experts)
            routing = dataclasses.replace(routing, bias=each, gains=each)
        logits = make.weight(dataclasses.replace(shapes, quantization=None), shapes.experts, shapes.hidden)
        yield "linear, router", lambda: gpu.linear(x, logits, tile_rows=32, out=router)
        yield "route", lambda: gpu.route(router, routing, make.longs(rows))
        biases: dict[str, Tensor] = {}
        if shapes.expert_biases:
            widths = {"gate_up_bias": 2 * inner, "down_bias": shapes.hidden}
            biases = {name: make.of(shapes.experts, n, dtype=shapes.dtype) for name, n in widths.items()}
        for tile in (16, 64):
            arguments = x, ids, weights, first, second, shapes.activation
            yield (
                f"mixture, tiles of {tile}",
                partial(gpu.mixture, *arguments, residual=x, tile_rows=tile, **biases),
            )
    else:
        first = make.weight(shapes, 2 * inner, shapes.hidden)
        second = make.weight(shapes, shapes.hidden, inner)
        middle = make.of(rows, inner, dtype=shapes.dtype)
        gated = {"activation": shapes.activation}
        yield "linear, gate/up", lambda: product(x, first, **gated)
        if norms:
            yield "linear, norm and gate/up", lambda: product(x, first, **gated, norm=row_norm)
        yield "linear, down", lambda: product(middle, second, residual=x)


def _cache_steps(shapes: ModelShapes, make: _Dummies, rows: int) -> Iterator[Step]:
    """RoPE with the KV store, and attention, for `rows` decodes and a prefill of 8 tokens."""
    dtype = shapes.cache_dtype or shapes.dtype
    k_cache = make.of(4, shapes.kv_heads, shapes.block, shapes.size, dtype=dtype)
    v_cache = make.of(4, shapes.kv_heads, shapes.block, shapes.value_size, dtype=dtype)
    width = shapes.heads * shapes.size + shapes.kv_heads * (shapes.size + shapes.value_size)
    qkv = make.of(rows, width, dtype=shapes.dtype)
    norm = make.of(shapes.size, dtype=shapes.dtype) if shapes.qk_norm else None
    table = make.floats(64, shapes.rotary)
    turn = partial(
        gpu.rope_store, cos=table, sin=table, slots=make.longs(rows), k_cache=k_cache, v_cache=v_cache,
        heads=shapes.heads, positions=make.longs(rows), q_weight=norm, norm_offset=shapes.norm_offset,
        interleaved=shapes.interleaved,
    )  # fmt: skip
    yield "rope_store", partial(turn, qkv, k_weight=norm, value_norm=bool(shapes.layer_input))
    if shapes.layer_input:
        alone = make.of(rows, shapes.heads * shapes.size, dtype=shapes.dtype)
        yield "rope_store, queries alone", partial(turn, alone, stores=False)
    key = make.of(rows, shapes.kv_heads, shapes.size, dtype=shapes.dtype)
    value = make.of(rows, shapes.kv_heads, shapes.value_size, dtype=shapes.dtype)
    yield "store_kv", lambda: gpu.store_kv(key, value, k_cache, v_cache, make.longs(rows))
    yield "copy_blocks", lambda: gpu.copy_blocks(k_cache, v_cache, make.longs(1), make.longs(1))
    query = make.of(rows, shapes.heads, shapes.size, dtype=shapes.dtype)
    blocks, lengths = make.ints(rows, 4), make.ints(rows)
    sinks = make.floats(shapes.heads) if shapes.sinks else None
    chunk = make.of(8, shapes.heads, shapes.size, dtype=shapes.dtype)
    for window in shapes.windows:
        keywords = {"scale": 1.0, "window": window, "softcap": shapes.softcap, "sinks": sinks}
        decode = partial(gpu.paged_attention_decode, query, k_cache, v_cache, blocks, lengths, **keywords)
        yield f"attention, decode, window {window}", decode
        step = make.ints(2, 4), make.ints(2), make.ints(3)
        prefill = partial(gpu.paged_attention_prefill, chunk, k_cache, v_cache, *step, **keywords)
        yield f"attention, prefill, window {window}", prefill


def _state_steps(shapes: ModelShapes, state: StateShapes, make: _Dummies, rows: int) -> Iterator[Step]:
    """The kernels of a layer that carries a state, for `rows` tokens of as many sequences."""
    floats, dtype, width = make.floats, shapes.dtype, state.heads * state.value_size
    rule = Rule(
        state.key_heads, state.heads, state.key_size, state.value_size, floats(state.heads), floats(state.heads),
        state.delta, skip=None if state.delta else floats(state.heads),
    )  # fmt: skip
    channels = rule.width if state.heads else shapes.hidden
    conv = Conv(
        floats(state.taps, channels),
        floats(channels) if state.bias else None,
        None if state.gated else "silu",
        state.gated,
    )
    x = make.of(rows, 3 * channels if state.gated else channels + width, dtype=dtype)
    whose = make.longs(rows), make.ints(rows), make.ints(rows + 1)
    inputs = make.of(rows, state.taps - 1, channels, dtype=dtype)
    yield "causal_conv", lambda: gpu.causal_conv(x, conv, inputs, whose)
    yield "copy_states", lambda: gpu.copy_states(inputs, make.longs(1), make.longs(1))
    if state.heads:
        mixed, gates = (
            make.of(rows, channels, dtype=dtype),
            floats(rows, (2 if state.delta else 1) * state.heads),
        )
        held = floats(rows, state.heads, state.key_size, state.value_size)
        yield "recur", lambda: gpu.recur(mixed, gates, rule, held, whose)
        read, size = make.of(rows, width, dtype=dtype), state.value_size if state.delta else width
        norm = GatedNorm(make.of(size, dtype=dtype), 1e-6, size, gate_first=not state.delta)
        yield "gated_norm", lambda: gpu.gated_norm(read, x, norm)
        yield "gate_mul", lambda: gpu.gate_mul(read, read)


def _sampler_steps(shapes: ModelShapes, make: _Dummies, rows: int) -> Iterator[Step]:
    """Everything from logits to tokens."""
    logits = make.of(rows, shapes.vocabulary, dtype=shapes.logits_dtype)
    longs, floats = make.longs(rows), make.floats(rows)
    counts = make.ints(rows, shapes.vocabulary)
    seen = make.of(rows, shapes.vocabulary, dtype=torch.bool)
    penalties = gpu.Penalties(longs, counts, seen, floats, floats, floats)
    mask = gpu.Mask(longs, make.ints(rows, -(-shapes.vocabulary // 32)))
    bias = gpu.Bias(longs, longs, floats)
    for some in ({}, {"penalties": penalties}, {"mask": mask}, {"penalties": penalties, "mask": mask}):
        yield "adjust_logits", partial(gpu.adjust_logits, logits, bias=bias, **some)
    adjusted = make.floats(rows, shapes.vocabulary)
    yield "apply_logit_bias", lambda: gpu.apply_logit_bias(adjusted, longs, longs, floats)
    yield "apply_bitmask", lambda: gpu.apply_bitmask(adjusted, longs, mask.bits)
    yield "filter_logits", lambda: gpu.filter_logits(adjusted, floats, longs, floats)
    counted = {"slots": longs, "output_counts": counts, "flags": make.ints(rows)}
    settings = floats, floats, longs, floats, longs, longs
    for source in (logits, adjusted):
        for filtered in (True, False):
            yield "sample", partial(gpu.sample, source, *settings, filtered=filtered, **counted)
    yield "token_logprobs", lambda: gpu.token_logprobs(logits, longs, 5)


def compile_all(
    shapes: ModelShapes, device: torch.device, progress: Callable[[str, float], None] | None = None
) -> None:
    """Compile what a model of `shapes` calls; `progress(kernel, share done)` before each one.

    On a CUDA device the kernels run once, on zeros, so nothing is compiled while requests wait.
    """
    make = _Dummies(device)
    steps: list[Step] = []
    for rows in shapes.batches:
        steps += [*_layer_steps(shapes, make, rows), *_cache_steps(shapes, make, rows)]
        for state in shapes.states:
            steps += _state_steps(shapes, state, make, rows)
    steps += _sampler_steps(shapes, make, max(shapes.batches))
    for done, (name, step) in enumerate(steps):
        if progress is not None:
            progress(name, done / len(steps))
        step()


_EXPERTS = ModelShapes(
    heads=16, kv_heads=16, size=192, value_size=128, rotary=32, interleaved=True, sinks=True,
    experts=64, experts_per_token=6, intermediate=1408, hidden=2048, batches=(2,),
)  # fmt: skip
_GPT_OSS = ModelShapes(
    heads=64, kv_heads=8, size=64, value_size=64, rotary=32, sinks=True, windows=(0, 128), hidden=2880,
    intermediate=2880, experts=32, experts_per_token=4, expert_biases=True, activation="swiglu_oai", batches=(2,),
)  # fmt: skip
_GLM_AIR = ModelShapes(
    heads=96, experts=128, experts_per_token=8, intermediate=1408, batches=(2,),
    routing=Routing(8, scoring="sigmoid", groups=4, top_groups=2, scale=2.5),
)  # fmt: skip
_DELTA = StateShapes(key_heads=16, heads=16)
_STATES = (
    _DELTA,
    StateShapes(key_heads=1, heads=48, value_size=64, delta=False, bias=True),
    StateShapes(taps=3, gated=True),
)
"""Those of Qwen3.5, Granite 4 and LFM2."""
_QWEN35 = ModelShapes(
    hidden=1024, heads=8, kv_heads=2, size=256, value_size=256, rotary=32, intermediate=3584, vocabulary=248320,
    qk_norm=True, norm_offset=1.0, states=(_DELTA,), batches=(1, 32),
)  # fmt: skip
_GEMMA4 = ModelShapes(
    hidden=1536, heads=8, kv_heads=1, size=512, value_size=512, rotary=256, intermediate=6144, vocabulary=262144,
    activation="gelu_tanh", qk_norm=True, layer_input=256, batches=(1, 32),
)  # fmt: skip
"""Its layers that see everything; the others' heads are half as large."""
_OFFLINE = (
    ModelShapes(batches=(1, 32, 128), states=_STATES),
    ModelShapes(quantization="fp8_dynamic", batches=(1, 32, 64, 256, 4096)),
    ModelShapes(size=64, value_size=64, rotary=32, quantization="fp8", cache_dtype=FP8, batches=(1, 128)),
    ModelShapes(size=80, value_size=80, rotary=16, quantization="int8", batches=(1,)),
    ModelShapes(
        heads=9, kv_heads=3, size=96, value_size=96, rotary=48, quantization="int4", batches=(1, 128)
    ),
    ModelShapes(
        size=256, value_size=256, rotary=128, windows=(0, 4096), softcap=50.0, qk_norm=True, batches=(4,)
    ),
    _EXPERTS,
    _GPT_OSS,
    _GLM_AIR,
    _QWEN35,
    _GEMMA4,
)
_QUICK = (
    ModelShapes(batches=(1, 32), states=_STATES),
    ModelShapes(quantization="fp8_dynamic", batches=(1, 4096)),
    _EXPERTS,
    _GPT_OSS,
    _GLM_AIR,
    _GEMMA4,
)
"""Between them they call every kernel."""


def _summary(kernel: CompiledKernel, overlap: bool) -> dict[str, object]:
    """A kernel's needs, and what its PTX says about matrix units and the wait for the kernel before it."""
    row = dataclasses.asdict(kernel)
    before, _, after = row.pop("ptx").partition("griddepcontrol.wait")
    ptx = before + after
    return {
        **row,
        "mma": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "wgmma_e4m3": len(re.findall(r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", ptx)),
        "overlap": overlap,
        "waits": bool(after),
        "reads_before_wait": bool(after) and ("ld.global" in before or "cp.async" in before),
        "prefetches_before_wait": bool(after) and "prefetch.global" in before,
    }


def main() -> None:
    """Compile for an H200 that isn't there and print each kernel's needs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--offline", action="store_true", required=True)
    parser.add_argument("--quick", action="store_true", help="every kernel for a few shapes, not for all")
    every = ((False, _OFFLINE), (True, _OFFLINE[:2]))
    rows = []
    for overlap, models in ((True, _QUICK),) if parser.parse_args().quick else every:
        with compiling_for(90) as kernels, overlapping_launches(overlap):
            for shapes in models:
                compile_all(shapes, META)
        rows += [_summary(kernel, overlap) for kernel in kernels]
    json.dump(rows, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
