"""Mixtures of experts in C++ against plain torch: every instruction set, format, way of choosing, and company."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import reference
from tokenmill.kernels.cpu import elementwise, tape
from tokenmill.kernels.cpu.isa import InstructionSet, supported
from tokenmill.kernels.cpu.library import using
from tokenmill.kernels.cpu.linear import PackedLinear
from tokenmill.kernels.cpu.mixture import Chooser, PackedMixture
from tokenmill.kernels.cpu.quantized import QuantizedLinear, magnitude
from tokenmill.kernels.reference import Routing

EXPERTS, WIDTH, INNER, OUT, TOP = 7, 70, 48, 67, 3
TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 2e-6}


@pytest.fixture(params=supported(), ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    with using(request.param):
        yield request.param


class Experts:
    """Random experts, packed, and what they stand for in full."""

    def __init__(self, dtype: torch.dtype, bits: int | None = None, activation: str = "silu") -> None:
        generator = torch.Generator().manual_seed(3)
        self.activation = activation
        self.biases = [torch.randn(EXPERTS, rows, generator=generator) for rows in (2 * INNER, OUT)]
        full, packed = [], []
        for (rows, inputs), bias, gate in zip(
            ((2 * INNER, WIDTH), (OUT, INNER)), self.biases, (activation, None), strict=True
        ):
            weights = (torch.randn(EXPERTS, rows, inputs, generator=generator) / inputs**0.5).to(dtype)
            weights[2] *= 0.01  # scales of another size
            parts: list[PackedLinear]
            if bits is None:
                parts = [PackedLinear(weight, own, gate) for weight, own in zip(weights, bias, strict=True)]
            else:
                most = magnitude(weights)
                parts = [
                    QuantizedLinear(weight, bits, None, own, gate, most)
                    for weight, own in zip(weights, bias, strict=True)
                ]
            full.append(torch.stack([part.rows(torch.arange(rows), torch.float32) for part in parts]))
            packed.append(parts)
        self.full = full
        self.packed = PackedMixture(*packed)

    def expected(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
        """In float64, where hidden values are rounded to x's type as the kernel's are."""
        out = torch.zeros(x.shape[0], OUT, dtype=torch.float64)
        for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights.double(), strict=True)):
            for expert, share in zip(chosen, shares, strict=True):
                if expert < 0:
                    continue
                up, down = (part[expert].double() for part in self.full)
                hidden = (x[token].double() @ up.T + self.biases[0][expert].double())[None]
                hidden = reference.activation_mul(hidden, self.activation).to(x.dtype).double()
                out[token] += share * (hidden[0] @ down.T + self.biases[1][expert].double())
        return out if residual is None else out + residual.double()


def step(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, ids with a token of padding, weights and a residual."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    slots = torch.arange(tokens)
    slots[3:4] = -1
    ids, weights = reference.route(torch.randn(tokens, EXPERTS, generator=generator), Routing(TOP), slots)
    return x, ids, weights, torch.randn(tokens, OUT, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("tokens", [1, 5, 150])
def test_mixture(isa: InstructionSet, dtype: torch.dtype, bits: int | None, tokens: int) -> None:
    experts = Experts(dtype, bits)
    x, ids, weights, residual = step(tokens, dtype)
    for added in (None, residual):
        out, expected = experts.packed(x, ids, weights, added), experts.expected(x, ids, weights, added)
        assert float((out.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    if tokens > 3:
        assert torch.equal(experts.packed(x, ids, weights, residual)[3], residual[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_token_is_the_same_bits_in_any_company(
    isa: InstructionSet, dtype: torch.dtype, bits: int | None
) -> None:
    experts = Experts(dtype, bits)
    x, ids, weights, residual = step(3000, dtype)  # more rows than are taken at once
    whole = experts.packed(x, ids, weights, residual)
    for part in (slice(0, 1), slice(5, 40), slice(2700, 3000)):
        alone = experts.packed(x[part], ids[part], weights[part], residual[part])
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(isa: InstructionSet, activation: str) -> None:
    experts = Experts(torch.float32, activation=activation)
    x, ids, weights, _ = step(9, torch.float32)
    expected = experts.expected(x, ids, weights, None)
    error = experts.packed(x, ids, weights).double() - expected
    assert float(error.norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_clamped_gate(isa: InstructionSet, dtype: torch.dtype) -> None:
    """(up + 1) * x * sigmoid(1.702 x), x at most 7, up from -7 to 7."""
    gate, up = torch.randn(2, 40, 50) * 6
    both = torch.cat([gate, up], dim=1).to(dtype)
    low, high = both.double().chunk(2, dim=1)
    low, high = low.clamp(max=7), high.clamp(-7, 7)
    expected = (high + 1) * low * torch.sigmoid(1.702 * low)
    out = elementwise.activation_mul(both, "swiglu_oai")
    assert float((out.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    both[7, 60] = both[8, 3] = torch.nan
    out = elementwise.activation_mul(both, "swiglu_oai")
    assert out.isnan().nonzero().tolist() == [[7, 10], [8, 3]]


@pytest.mark.parametrize("bits", [None, 8])
def test_a_token_that_is_not_a_number_spoils_no_other(isa: InstructionSet, bits: int | None) -> None:
    experts = Experts(torch.bfloat16, bits)
    x, ids, weights, residual = step(20, torch.bfloat16)
    sound = experts.packed(x, ids, weights, residual)
    x[5, 11] = torch.nan
    out = experts.packed(x, ids, weights, residual)
    others = torch.arange(20) != 5
    assert out[5].isnan().all()
    assert torch.equal(out[others], sound[others])


ROUTINGS = {
    "softmax": Routing(4),
    "not renormalized": Routing(4, renormalize=False),
    "one": Routing(1, renormalize=False),
    "all": Routing(24),
    "sigmoid": Routing(4, scoring="sigmoid", scale=2.5),
    "bias": Routing(4, bias=torch.linspace(1, -1, 24)),
    "groups": Routing(4, scoring="sigmoid", groups=6, top_groups=2, bias=torch.arange(24) % 5 / 7),
    "groups without a bias": Routing(3, renormalize=False, groups=4, top_groups=1),
    "gains": Routing(4, scale=0.5, gains=torch.linspace(0.5, 2, 24)),
    "groups of one": Routing(3, groups=24, top_groups=5),
}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_choosing(isa: InstructionSet, routing: Routing) -> None:
    logits = (torch.randn(50, 24) * 8).round() / 4  # with equal ones
    slots = torch.arange(50) - 2
    for given in (None, slots):
        ids, weights = Chooser(routing, 24)(logits, given)
        expected_ids, expected_weights = reference.route(logits, routing, given)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)


def test_logits_that_are_not_numbers_still_choose_experts_that_exist() -> None:
    logits = torch.full((3, 24), torch.nan)
    logits[1, 5] = 1.0
    for routing in ROUTINGS.values():
        ids, _ = Chooser(routing, 24)(logits)
        assert all(len(set(row)) == routing.top and 0 <= min(row) <= max(row) < 24 for row in ids.tolist())


def test_what_does_not_fit_is_refused() -> None:
    experts = Experts(torch.float32)
    x, ids, weights, residual = step(4, torch.float32)
    with pytest.raises(ValueError, match="x must have shape"):
        experts.packed(x[:, 1:].contiguous(), ids, weights)
    with pytest.raises(ValueError, match="residual must be"):
        experts.packed(x, ids, weights, residual.bfloat16())
    with pytest.raises(ValueError, match="ids must be"):
        experts.packed(x, ids.long(), weights)
    up, down = PackedLinear(torch.zeros(8, 4), None, "silu"), PackedLinear(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="one shape and format"):
        PackedMixture([up, PackedLinear(torch.zeros(10, 4), None, "silu")], [down, down])
    with pytest.raises(ValueError, match="4 hidden values don't go into 5"):
        PackedMixture([up], [PackedLinear(torch.zeros(3, 5))])
    with pytest.raises(ValueError, match="aren't a mixture's"):
        PackedMixture([up], [])
    quantized = [QuantizedLinear(torch.eye(4) * factor, 4) for factor in (1, 100)]
    with pytest.raises(ValueError, match="one shape and format"):
        PackedMixture([up, up], quantized)
    with pytest.raises(ValueError, match="can't choose 9 of 8"):
        Chooser(Routing(9), 8)
    with pytest.raises(ValueError, match="groups of 8 experts"):
        Chooser(Routing(2, groups=3), 8)
    with pytest.raises(ValueError, match="don't hold 3 experts"):
        Chooser(Routing(3, groups=4, top_groups=1), 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_recorded_mixture_is_the_same_bits(isa: InstructionSet, dtype: torch.dtype) -> None:
    """With an expert for all tokens beside it, as large as a tile of rows and larger."""
    experts, generator = Experts(dtype), torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    table, norm = weight(30, WIDTH), weight(WIDTH) + 1
    router = PackedLinear(weight(EXPERTS, WIDTH), torch.randn(EXPERTS, generator=generator))
    shared, gate, last = (PackedLinear(weight(rows, WIDTH)) for rows in (OUT, 1, OUT))
    chooser = Chooser(Routing(TOP, scoring="sigmoid", bias=torch.randn(EXPERTS)), EXPERTS)

    t = tape.Tape(dtype)
    normed = t.rms_norm(t.gather(table), norm, 1e-6)
    logits = t.linear(router, normed, wide=True)
    common = t.gate_add(t.linear(shared, normed), t.linear(gate, normed), t.linear(last, normed))
    t.seal(t.pick(t.mixture(experts.packed, chooser, normed, logits, common)))

    for tokens in (1, 3, 40, 90):
        ids = torch.randint(30, (tokens,), generator=generator)
        slots = torch.arange(tokens)
        slots[1:2] = -1
        rows = elementwise.rms_norm(table[ids], norm, 1e-6)
        scores = router(rows, out=torch.empty(tokens, EXPERTS))
        added = elementwise.gate_add(shared(rows), gate(rows), last(rows))
        expected = experts.packed(rows, *chooser(scores, slots), added)
        lengths = torch.tensor([tokens], dtype=torch.int32)
        out = t.run(
            *(ids, torch.arange(tokens), slots, torch.zeros(1, 9, dtype=torch.int32), lengths),
            *(torch.tensor([0, tokens], dtype=torch.int32), torch.arange(tokens)),
        )
        assert torch.equal(out, expected)


def test_what_a_tape_cannot_mix_is_refused() -> None:
    experts, t = Experts(torch.float32), tape.Tape(torch.float32)
    x = t.gather(torch.zeros(3, WIDTH))
    narrow = t.linear(PackedLinear(torch.zeros(EXPERTS, WIDTH)), x)
    with pytest.raises(ValueError, match="aren't those of the mixture"):
        t.mixture(experts.packed, Chooser(Routing(TOP), EXPERTS), x, narrow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gated_sums(isa: InstructionSet, dtype: torch.dtype) -> None:
    x, gate, residual = (torch.randn(13, width).to(dtype) for width in (67, 1, 67))
    for added in (None, residual):
        out, expected = elementwise.gate_add(x, gate, added), reference.gate_add(x, gate, added)
        torch.testing.assert_close(out, expected, rtol=8e-3 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
