"""Matrix products of 16-bit rows, dense or by experts, and the norms and activations around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu import reference_gpu
from tokenmill.kernels.gpu.cases import poisoned, relative_error
from tokenmill.kernels.gpu.selfcheck.trial import TOLERANCE, CheckResult, Trial, differing, label
from tokenmill.kernels.groups import Groups, Kind
from tokenmill.kernels.reference import Routing

_QUANTIZERS: dict[str, Callable[[Tensor], Any]] = {
    "fp8": lambda weight: gpu.quantize_fp8(weight),
    "int8": lambda weight: gpu.quantize_int8(weight),
    "int4/32": lambda weight: gpu.quantize_int4(weight, 32),
    "int4/128": lambda weight: gpu.quantize_int4(weight, 128),
    "mxfp4": lambda weight: gpu.hold(_packed(weight, "fp4", 32)),
    "int4/128 with minima": lambda weight: gpu.hold(_packed(weight, "int4", 128)),
}


def _packed(weight: Tensor, kind: Kind, group: int) -> Groups:
    """Random codes of `weight`'s shape and size, as checkpoints have them."""
    *before, inputs = weight.shape
    generator = torch.Generator(weight.device).manual_seed(1)
    codes = torch.randint(
        0, 256, (*before, inputs // 2), dtype=torch.uint8, device=weight.device, generator=generator
    )
    scale = weight.float().reshape(*before, -1, group).abs().amax(-1) / 8
    return Groups(kind, codes, scale, -scale * 8 if kind == "int4" else None, group)


def elementwise(trial: Trial) -> Iterator[CheckResult]:
    """Norms, with and without the residual, and gated activations."""
    for dtype in trial.dtypes:
        allowed = TOLERANCE[dtype]
        for rows, width in ((1, 33), (trial.rows, trial.width)):
            x, residual = trial.randn(rows, width, dtype=dtype), trial.randn(rows, width, dtype=dtype)
            weight = trial.randn(width, dtype=dtype)
            out = poisoned(rows, width, dtype=dtype, device=trial.device)
            gpu.rms_norm(x, weight, 1e-5, 1.0, out=out)
            error = relative_error(out, reference.rms_norm(x, weight, 1e-5, 1.0))
            yield CheckResult(label("rms_norm", dtype, f"[{rows}, {width}]"), error, allowed)
            out, total = out.fill_(float("nan")), poisoned(rows, width, dtype=dtype, device=trial.device)
            gpu.add_rms_norm(x, residual, weight, 1e-5, out=out, total=total)
            expected = reference.add_rms_norm(x, residual, weight, 1e-5)
            error = max(relative_error(out, expected[0]), relative_error(total, expected[1]))
            yield CheckResult(label("add_rms_norm", dtype, f"[{rows}, {width}]"), error, allowed)
            sum_of = x.repeat(1, 3), weight, 1e-5, 1.0, residual.repeat(1, 3), 0.7
            error = relative_error(gpu.norm_add(*sum_of), reference.norm_add(*sum_of))
            yield CheckResult(label("norm_add", dtype, f"[{rows}, 3 * {width}]"), error, allowed)
            product_of = x[:, 5:].contiguous(), residual, 3, "gelu_tanh"
            error = relative_error(gpu.act_mul(*product_of), reference.act_mul(*product_of))
            yield CheckResult(label("act_mul", dtype, f"[{rows}, {width - 5}]"), error, allowed)
        for activation in ("silu", "gelu", "gelu_tanh", "swiglu_oai"):
            gate_up = trial.randn(trial.rows, 2 * trial.width + 2, dtype=dtype) * 3
            out = poisoned(trial.rows, trial.width + 1, dtype=dtype, device=trial.device)
            gpu.activation_mul(gate_up, activation, out=out)
            error = relative_error(out, reference.activation_mul(gate_up, activation))
            yield CheckResult(label(activation, dtype), error, allowed)


def linears(trial: Trial) -> Iterator[CheckResult]:
    """Products of few rows, plain, with a norm inside and with quantized weights."""
    shapes = [(64, 16), (576, 33), (trial.width - trial.width % 256 or 256, trial.outputs)]
    for dtype in trial.dtypes:
        for inputs, outputs in shapes:
            for rows in (1, 3, 16, 17):
                x, weight = trial.randn(rows, inputs, dtype=dtype), trial.randn(outputs, inputs, dtype=dtype)
                bias, residual = trial.randn(outputs), trial.randn(rows, outputs, dtype=dtype)
                out = poisoned(rows, outputs, dtype=dtype, device=trial.device)
                gpu.linear(x, weight, bias=bias, residual=residual, out=out)
                expected = reference_gpu.linear(x, weight, bias=bias, residual=residual)
                detail = f"{rows} rows, {inputs} to {outputs}"
                error = relative_error(out, expected)
                yield CheckResult(label("linear", dtype, detail), error, TOLERANCE[dtype])
                row = gpu.linear(x[:1], weight, bias=bias, residual=residual[:1])
                name = label("linear: a row alone = in a crowd", dtype, detail)
                yield CheckResult(name, differing(row, out[:1]), 0.0)
            for rows in (1, 2, 8):
                yield from _normed_linear(trial, rows, inputs, outputs, dtype)
        for name, quantize in _QUANTIZERS.items():
            x, quantized = trial.randn(2, 512, dtype=dtype), quantize(trial.randn(96, 512))
            for activation in (None, "silu"):
                out = gpu.linear(x, quantized, activation=activation)
                error = relative_error(out, reference_gpu.linear(x, quantized, activation=activation))
                yield CheckResult(label(f"linear, {name}, {activation}", dtype), error, TOLERANCE[dtype])


def _normed_linear(
    trial: Trial, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> Iterator[CheckResult]:
    """A norm inside of its product: near the twin, and to the bit what norm and product make one by one."""
    x, weight = trial.randn(rows, inputs, dtype=dtype), trial.randn(2 * outputs, inputs, dtype=dtype)
    norm = gpu.RowNorm(trial.randn(inputs, dtype=dtype), 1e-5, 1.0)
    weight *= inputs**-0.5
    for activation in (None, "silu"):
        out = gpu.linear(x, weight, activation=activation, norm=norm)
        detail = f"{rows} rows, {inputs} to {outputs}, {activation}"
        error = relative_error(out, reference_gpu.linear(x, weight, activation=activation, norm=norm))
        yield CheckResult(label("norm in a linear", dtype, detail), error, TOLERANCE[dtype])
        normed = gpu.rms_norm(x, norm.weight, norm.eps, norm.offset)
        different = differing(out, gpu.linear(normed, weight, activation=activation))
        yield CheckResult(label("norm in a linear = before it", dtype, detail), different, 0.0)


def experts(trial: Trial) -> Iterator[CheckResult]:
    """The choice of experts and their mixture, plain and in 8 bits."""
    tokens, experts, inner, width = trial.rows * 2, 8, 128, 64
    for dtype in trial.dtypes:
        x = trial.randn(tokens, width, dtype=dtype)
        router = trial.randn(tokens, experts)
        slots = torch.arange(tokens, device=trial.device) - 1
        ids, weights = gpu.route(router, Routing(2), slots)
        wanted = reference.route(router, Routing(2), slots)
        yield CheckResult(label("route, ids", dtype), differing(ids, wanted[0]), 0.0)
        yield CheckResult(label("route, weights", dtype), relative_error(weights, wanted[1]), 1e-5)
        yield from _grouped_routing(trial, router, slots, dtype)
        plain = trial.randn(experts, 2 * inner, width), trial.randn(experts, 72, inner)
        biases = {
            "gate_up_bias": trial.randn(experts, 2 * inner, dtype=dtype),
            "down_bias": trial.randn(experts, 72, dtype=dtype),
        }
        ways: dict[str, dict[str, Tensor]] = {"silu": {}, "swiglu_oai": biases}
        for name, (gate_up, down) in {
            "plain": (plain[0].to(dtype), plain[1].to(dtype)),
            "fp8": (gpu.quantize_fp8(plain[0]), gpu.quantize_fp8(plain[1])),
        }.items():
            for tile in (16, 64):
                for activation, biases in ways.items():
                    out = poisoned(tokens, 72, dtype=dtype, device=trial.device)
                    gpu.mixture(x, *wanted, gate_up, down, activation, tile_rows=tile, out=out, **biases)
                    expected = reference_gpu.mixture(x, *wanted, gate_up, down, activation, **biases)
                    error = relative_error(out, expected)
                    what = label(f"mixture, {name}, {activation}, tiles of {tile}", dtype)
                    yield CheckResult(what, error, TOLERANCE[dtype])


def _grouped_routing(
    trial: Trial, router: Tensor, slots: Tensor, dtype: torch.dtype
) -> Iterator[CheckResult]:
    """GLM's choice: sigmoids, a correction, the best groups, a scale."""
    correction = torch.linspace(-0.3, 0.3, router.shape[1], device=trial.device)
    routing = Routing(2, scoring="sigmoid", bias=correction, groups=4, top_groups=2, scale=2.5)
    ids, weights = gpu.route(router, routing, slots)
    wanted = reference.route(router, routing, slots)
    yield CheckResult(label("route by groups, ids", dtype), differing(ids, wanted[0]), 0.0)
    yield CheckResult(label("route by groups, weights", dtype), relative_error(weights, wanted[1]), 1e-5)
