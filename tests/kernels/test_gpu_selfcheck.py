"""The self-check itself, small, under Triton's interpreter; and that it would notice a fault."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import gpu
from tokenmill.kernels.gpu import selfcheck
from tokenmill.kernels.gpu.cases import poisoned, relative_error
from tokenmill.kernels.gpu.jit import FP8, check_toolchain
from tokenmill.kernels.gpu.norms import rms_norm
from tokenmill.kernels.gpu.overlap import launch_options
from tokenmill.kernels.gpu.selfcheck import graph, products
from tokenmill.kernels.gpu.selfcheck.trial import make_trial

CPU = torch.device("cpu")

# exp saturates to infinity where the functions are flat; numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def test_every_kernel_passes() -> None:
    results = selfcheck.check_all(CPU, seed=11)
    assert len(results) > 60
    assert [result for result in results if not result.passed] == []


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, **keywords: Tensor) -> Tensor:
        return rms_norm(x, weight, 20000 * eps, offset, **keywords)

    monkeypatch.setattr(gpu, "rms_norm", wrong)
    failed = [result.name for result in products.elementwise(make_trial(CPU, 0)) if not result.passed]
    assert any(name.startswith("rms_norm") for name in failed)


class Called:
    """In a graph's place: the work itself."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.replay = work


def test_the_check_of_a_graph_passes_with_calls_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_captured", Called)
    results = list(graph.graph(make_trial(CPU, 4)))
    assert [result.passed for result in results] == [True, True]


def test_groups_come_one_by_one() -> None:
    groups = selfcheck.check_groups(CPU, 2)
    assert {"elementwise", "attention", "linears", "draws"} <= set(groups)
    assert next(groups["elementwise"]).name.startswith("rms_norm bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8, torch.int32])
def test_poison_left_in_an_output_is_an_infinite_error(dtype: torch.dtype) -> None:
    out = poisoned(2, 3, dtype=dtype, device=CPU)
    assert relative_error(out.float(), torch.ones(2, 3)) > 1e6


def test_relative_error_agrees_about_infinities() -> None:
    reference = torch.tensor([1.0, float("-inf"), 2.0])
    assert relative_error(reference.clone(), reference) == 0.0
    assert relative_error(torch.tensor([1.0, 5.0, 2.0]), reference) == float("inf")
    assert relative_error(torch.tensor([1.0, float("-inf"), float("nan")]), reference) == float("inf")


def test_the_interpreter_needs_no_toolchain() -> None:
    assert check_toolchain() is None


def test_overlapping_launches_are_for_chips_only() -> None:
    with gpu.overlapping_launches():
        assert launch_options() == {"PDL": False}
        assert torch.equal(gpu.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0), torch.ones(1, 4))
    assert not gpu.supports_overlap(CPU)


def test_every_name_of_the_package_resolves() -> None:
    for name in gpu.__all__:
        assert callable(getattr(gpu, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gpu.nothing
