"""Fused siblings compute what they did apart, hold their weights once, and only real siblings are fused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import PAGED_TYPES, paged_logits, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tokenmill.engine import attention, guards
from tokenmill.engine.fusion import LinearGroup, SiblingLinear, fuse_siblings

GROUPS = {  # fused groups of two layers: q/k/v and gate/up, or what the type has of them
    "llama": 4, "qwen2": 4, "qwen3": 4, "mistral": 4, "gemma": 4, "gemma2": 4, "gemma3_text": 4, "olmo2": 4,
    "granite": 4, "starcoder2": 2, "opt": 2, "gpt2": 0, "phi3": 0,
    "qwen3_moe": 2, "mixtral": 2, "gpt_oss": 2, "glm4": 2,
}  # fmt: skip


def load(model_type: str, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    attention.register()
    folder = tiny(model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME, dtype=dtype)
    return model.requires_grad_(False).eval()


def storage_bytes(module: nn.Module) -> int:
    """Bytes of all memory that the module's parameters hold, shared memory counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in module.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("model_type", PAGED_TYPES)
def test_logits_and_memory_stay(model_type: str) -> None:
    model = load(model_type)
    texts = [torch.randint(0, 320, (n,), generator=torch.Generator().manual_seed(n)) for n in guards.LENGTHS]
    with torch.no_grad():
        before, size = paged_logits(model, texts), storage_bytes(model)
        names = list(model.state_dict())
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        groups = fuse_siblings(model)
        after = paged_logits(model, texts)
    assert guards.relative_error(after, before) < 1e-5
    assert groups == GROUPS.get(model_type, groups)
    assert list(model.state_dict()) == names
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    added_biases = 4 * sum(x.numel() for x in model.parameters() if x.dim() == 1)
    assert size <= storage_bytes(model) <= size + added_biases
    for part in model.modules():
        if isinstance(part, SiblingLinear):
            assert part.group._input is None, "no output is kept after a forward"
            assert part.weight.untyped_storage().data_ptr() == part.group.weight.untyped_storage().data_ptr()


def test_a_fused_model_has_nothing_left_to_fuse() -> None:
    model = load("llama")
    assert fuse_siblings(model) == 4
    assert fuse_siblings(model) == 0


def test_half_precision_is_that_of_one_product() -> None:
    model, x = load("llama", "bfloat16"), torch.randn(1, 7, 64).bfloat16()
    layer = model.model.layers[0].self_attn
    wide = functional.linear(x, torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))
    fuse_siblings(model)
    layer = model.model.layers[0].self_attn
    assert torch.equal(torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1), wide)


def linears(*biases: bool) -> list[nn.Linear]:
    return [nn.Linear(6, 3 + i, bias=bias) for i, bias in enumerate(biases)]


@given(
    biases=st.lists(st.booleans(), min_size=2, max_size=4),
    calls=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30),
)
def test_any_order_of_calls_is_right(biases: list[bool], calls: list[tuple[int, int]]) -> None:
    members = linears(*biases)
    group = LinearGroup(members)
    fused = [SiblingLinear(member, group, i) for i, member in enumerate(members)]
    inputs = [torch.randn(2, 5, 6) for _ in range(3)]
    with torch.no_grad():
        for member, tensor in calls:
            member %= len(members)
            torch.testing.assert_close(fused[member](inputs[tensor]), members[member](inputs[tensor]))
        for i in range(len(members)):
            fused[i](inputs[0])
            fused[i].group.part(i, torch.zeros(1, 6))
    assert [x.bias is not None for x in fused] == biases


def test_the_last_sibling_forgets_the_output() -> None:
    group = LinearGroup(linears(True, False, False))
    x = torch.randn(4, 6)
    for index, left in ((1, True), (0, True), (2, False)):
        group.part(index, x)
        assert (group._input is not None) == left
    assert group._parts == []


class Toy(nn.Module):
    """A causal LM in shape only: its forward is what a test wants it to be."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [self.a(x), self.b(x)]

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack(self.outputs(self.embed(input_ids))).sum(0))


class Copies(Toy):
    def outputs(self, x: Tensor) -> list[Tensor]:
        return [self.a(x), self.b(x.clone())]


class Changed(Toy):
    def outputs(self, x: Tensor) -> list[Tensor]:
        first = self.a(x)
        return [first, self.b(x.add_(1.0))]


class Twice(Toy):
    def outputs(self, x: Tensor) -> list[Tensor]:
        return [self.a(x), self.b(x), self.b(x)]


class Shared(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.other = self.b


class Tied(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.b.weight


class Subclass(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.modules.linear.NonDynamicallyQuantizableLinear(6, 4)


class Hooked(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_forward_hook(lambda module, inputs, output: output * 2)


class Patched(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.b.forward = lambda x: functional.linear(x, self.b.weight)  # type: ignore[method-assign]


class Mixed(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = nn.Parameter(self.b.weight.to(torch.float64))

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [self.a(x), functional.linear(x.double(), self.b.weight).float()]


@pytest.mark.parametrize("kind", [Copies, Changed, Twice, Shared, Tied, Subclass, Hooked, Patched, Mixed])
def test_what_is_no_pair_of_siblings_stays(kind: type[Toy]) -> None:
    toy, ids = kind(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = toy(ids).logits
        assert fuse_siblings(toy) == 0
        assert torch.equal(toy(ids).logits, before)


def test_a_pair_of_siblings_is_fused() -> None:
    toy, ids = Toy(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = toy(ids).logits
        assert fuse_siblings(toy) == 1
        torch.testing.assert_close(toy(ids).logits, before)
    assert isinstance(toy.a, SiblingLinear)
    assert isinstance(toy.b, SiblingLinear)
    assert not isinstance(toy.c, SiblingLinear)
    assert not toy.a._forward_pre_hooks, "no hook is left behind"


def test_no_hook_is_left_when_the_forward_fails() -> None:
    class Failing(Toy):
        def outputs(self, x: Tensor) -> list[Tensor]:
            self.a(x)
            raise RuntimeError("no")

    toy = Failing()
    with pytest.raises(RuntimeError, match="no"):
        fuse_siblings(toy)
    assert not toy.a._forward_pre_hooks
    assert type(toy.a) is nn.Linear
