"""A recorded step gives the same bits as its operations called one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenmill.kernels.cpu import attention, elementwise, linear, tape

HIDDEN, HEADS, KV_HEADS, SIZE, VOCAB, BLOCK = 96, 6, 2, 16, 130, 16
DTYPES = [torch.bfloat16, torch.float32]


class Layer:
    """Random weights of one decoder layer with a cache of 20 blocks."""

    def __init__(self, dtype: torch.dtype, inner: int, generator: torch.Generator) -> None:
        def weight(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

        self.norms = [weight(HIDDEN) + 1 for _ in range(3)]
        self.bias = weight(HIDDEN)
        self.qkv = linear.PackedLinear(weight((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN))
        self.out = linear.PackedLinear(weight(HIDDEN, HEADS * SIZE), bias=weight(HIDDEN))
        self.up = linear.PackedLinear(weight(2 * inner, HIDDEN), activation="silu")
        self.down = linear.PackedLinear(weight(HIDDEN, inner))
        self.head_norm = weight(SIZE) + 1
        self.caches = [torch.zeros(20, KV_HEADS, BLOCK, SIZE, dtype=dtype) for _ in range(2)]


class Model:
    """Two layers under a tied embedding, called one by one or recorded."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.head = linear.PackedLinear((torch.randn(VOCAB, HIDDEN, generator=generator)).to(dtype))
        self.layers = [Layer(dtype, inner, generator) for inner in (200, 224)]  # the latter in whole tiles
        angles = torch.arange(300)[:, None] * 0.1 ** torch.arange(SIZE // 2)[None, :]
        self.cos, self.sin = angles.cos(), angles.sin()

    def one_by_one(self, step: dict[str, Tensor]) -> Tensor:
        x = self.head.rows(step["ids"], self.dtype)
        tables = (step["block_table"], step["seq_lens"], step["query_start"])
        for layer in self.layers:
            normed = elementwise.rms_norm(x, layer.norms[0], 1e-6, 1.0)
            query = elementwise.rope_store(
                layer.qkv(normed),
                self.cos,
                self.sin,
                step["slots"],
                *layer.caches,
                heads=HEADS,
                positions=step["positions"],
                q_weight=layer.head_norm,
                k_weight=layer.head_norm,
            )
            mixed = attention.paged_attention(query, *layer.caches, *tables, scale=0.25, window=9)
            x = layer.out(mixed.flatten(1), x)
            normed = elementwise.layer_norm(x, layer.norms[1], layer.bias, 1e-5)
            hidden = layer.down(layer.up(normed))
            hidden = elementwise.activate(elementwise.rms_norm(hidden, layer.norms[2], 1e-6), "gelu")
            x = (
                x + hidden * 0.5
                if self.dtype is torch.float32
                else (x.float() + hidden.float() * 0.5).to(x.dtype)
            )
        return self.head(elementwise.rms_norm(x[step["logits_index"]], self.layers[0].norms[0], 1e-6))

    def recorded(self) -> tape.Tape:
        t = tape.Tape(self.dtype)
        x = t.rows(self.head)
        for layer in self.layers:
            query = t.rope_store(
                t.linear(layer.qkv, t.rms_norm(x, layer.norms[0], 1e-6, 1.0)),
                self.cos,
                self.sin,
                *layer.caches,
                heads=HEADS,
                q_weight=layer.head_norm,
                k_weight=layer.head_norm,
            )
            x = t.linear(layer.out, t.attend(query, *layer.caches, scale=0.25, window=9), x)
            hidden = t.linear(
                layer.down, t.linear(layer.up, t.layer_norm(x, layer.norms[1], layer.bias, 1e-5))
            )
            hidden = t.activate(t.rms_norm(hidden, layer.norms[2], 1e-6), "gelu")
            x = t.scale_add(hidden, 0.5, x)
        t.seal(t.linear(self.head, t.rms_norm(t.pick(x), self.layers[0].norms[0], 1e-6)))
        return t


def steps() -> list[dict[str, Tensor]]:
    """A prefill of two prompts, a mixed step, a decode, and two without logits: of 35 rows down to 2."""
    table = torch.tensor([[3, 5, 7], [2, 9, 4]], dtype=torch.int32)
    done = [0, 0]
    made = []
    for counts in ([20, 15], [1, 14], [1, 1], [17, 0], [5, 0]):
        rows = [r for r in (0, 1) if counts[r]]
        positions = torch.cat([torch.arange(done[r], done[r] + counts[r]) for r in rows])
        of_row = torch.cat([torch.full((counts[r],), r) for r in rows])
        starts = torch.tensor([0, *[counts[r] for r in rows]]).cumsum(0)
        last = starts[1:] - 1 if counts[1] else starts[:0]
        done = [d + c for d, c in zip(done, counts, strict=True)]
        made.append(
            {
                "ids": torch.randint(0, VOCAB, (len(positions),), generator=torch.Generator().manual_seed(1)),
                "positions": positions,
                "slots": table[of_row, positions // BLOCK].long() * BLOCK + positions % BLOCK,
                "block_table": table[rows],
                "seq_lens": torch.tensor([done[r] for r in rows], dtype=torch.int32),
                "query_start": starts.to(torch.int32),
                "logits_index": last,
            }
        )
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tape_gives_the_bits_of_single_calls(dtype: torch.dtype) -> None:
    single, taped = Model(dtype), Model(dtype)
    recorded = taped.recorded()
    for step in steps():
        expected = single.one_by_one(step)
        assert torch.equal(recorded.run(**step), expected)
        for a, b in zip(single.layers, taped.layers, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.caches, b.caches, strict=True))


def test_results_do_not_share_memory() -> None:
    recorded = Model(torch.float32).recorded()
    first, second = steps()[:2]
    before = recorded.run(**first)
    kept = before.clone()
    recorded.run(**second)
    assert torch.equal(before, kept)


def test_buffers_are_few_and_shapes_are_checked() -> None:
    model = Model(torch.bfloat16)
    assert len(model.recorded()._widths) <= 6
    t = tape.Tape(torch.bfloat16)
    x = t.rows(model.head)
    with pytest.raises(ValueError, match="inputs can't take"):
        t.linear(model.layers[0].down, x)
    with pytest.raises(ValueError, match="residual"):
        t.linear(model.layers[0].qkv, x, residual=x)
    with pytest.raises(ValueError, match="isn't sealed"):
        t.run(**steps()[0])
    t.seal(t.pick(x))
    with pytest.raises(ValueError, match="is sealed"):
        t.pick(x)
    with pytest.raises(ValueError, match="positions"):
        t.run(**{**steps()[0], "positions": torch.zeros(2, dtype=torch.int64)})
