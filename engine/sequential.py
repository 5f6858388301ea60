"""The slow path: causal LMs whose attention can't go through the paged cache, one sequence at a time.

Each running sequence keeps the cache object that the model's own code makes (a DynamicCache, a recurrent state,
whatever it returns); a step calls the model once for each of its chunks. Prompts are never split, because
recurrent caches take many tokens only at their beginning. Scheduling, sampling and the API are the same.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.engine.input_batch import StepInputs
from tokenmill.engine.scheduler import Step

CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""What models call the cache that they return, and take back by the same name."""


class SequentialModel:
    """Runs steps on `module`, a causal LM in its own attention implementation.

    `state` holds for each slot either the model's cache or, for a model that makes none, all tokens so far.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._state: dict[int, Any] = {}
        parameters = inspect.signature(module.forward).parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), None)

    def start(self, slot: int) -> None:
        """A new sequence takes the slot: what the last one left is dropped."""
        self._state.pop(slot, None)

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor:
        """Logits [S + N, V] of the rows `inputs.logits_index`, in that order."""
        borders = inputs.query_start.tolist()
        wanted = inputs.logits_index
        rows: Tensor | None = None
        for chunk, first, last in zip(step.chunks, borders, borders[1:], strict=False):
            logits = self._run(chunk.sequence.slot, chunk.start, inputs.input_ids[first:last])
            for child in chunk.samplers[1:]:
                self._state[child.slot] = copy.deepcopy(self._state[chunk.sequence.slot])
            here = ((wanted >= first) & (wanted < last)).nonzero().flatten()
            if rows is None:
                rows = logits.new_empty(len(wanted), logits.shape[-1])
            rows[here] = logits[wanted[here] - first]
        assert rows is not None, "a step has at least one chunk"
        return rows

    def _run(self, slot: int, start: int, ids: Tensor) -> Tensor:
        """Logits [T, V] of tokens `ids` [T] that follow what the slot's cache holds."""
        if self._cache_name is None:
            seen = self._state[slot] if start else ids[:0]
            self._state[slot] = torch.cat([seen, ids])
            full: Tensor = self._module(input_ids=self._state[slot][None]).logits[0]
            return full[len(seen) :]
        cache = {self._cache_name: self._state[slot]} if start else {}
        output = self._module(input_ids=ids[None], use_cache=True, **cache)
        self._state[slot] = getattr(output, self._cache_name)
        logits: Tensor = output.logits[0]
        return logits
