"""Every kernel against its plain-torch twin, on random inputs that are new at each run.

`check_all` is what `make gpu-check` calls on a GPU, and what a test runs small under the interpreter. Outputs
are filled with NaN first and unused cache places hold NaN, so an element that is skipped, or read where it
mustn't be, shows as an infinite error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch

from tokenmill.kernels.gpu.selfcheck import attention, fp8, graph, products, sampling, states
from tokenmill.kernels.gpu.selfcheck.trial import CheckResult, Trial, make_trial

_Group = Callable[[Trial], Iterator[CheckResult]]

_EVERYWHERE: dict[str, _Group] = {
    "elementwise": products.elementwise,
    "rope_store": attention.rope_store,
    "attention": attention.paged_attention,
    "fp8_cache": attention.fp8_cache,
    "attention_rows": attention.attention_rows,
    "logits": sampling.adjusted_logits,
    "draws": sampling.draws,
    "linears": products.linears,
    "fp8": fp8.epilogues,
    "experts": products.experts,
    "states": states.states,
}
_ON_A_CHIP: dict[str, _Group] = {"graph": graph.graph, "overlap": graph.overlap, "fp8_crowds": fp8.crowds}


def rehearse_groups(device: torch.device, seed: int) -> None:
    """Call what the checks everywhere launch, whatever becomes of their results: for `compile_ahead`."""
    trial = make_trial(device, seed)
    for check in _EVERYWHERE.values():
        with suppress(Exception):  # the check itself will say so
            for _ in check(trial):
                pass


def check_groups(device: torch.device, seed: int) -> dict[str, Iterator[CheckResult]]:
    """Every check, those of a kind together and in order, on inputs drawn from `seed`.

    A group's checks run as its iterator is advanced.
    """
    trial = make_trial(device, seed)
    groups = _EVERYWHERE | (_ON_A_CHIP if device.type == "cuda" else {})
    return {name: check(trial) for name, check in groups.items()}


def check_all(device: torch.device, seed: int) -> list[CheckResult]:
    """The results of all `check_groups`."""
    return [result for group in check_groups(device, seed).values() for result in group]
