"""The slow path: causal LMs whose attention can't go through the paged cache, one sequence at a time.

    own cache    each running sequence keeps the cache object that the model's own code makes (keys and
                 values, a recurrent state); a step gives the model only the new tokens
    no cache     where that cache is missing or wrong, a sequence keeps its tokens, and a step computes all
                 of them anew

Prompts aren't split, because recurrent caches take many tokens only at their beginning. Scheduling, sampling
and the API are the same as on the other paths.
"""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.engine.input_batch import StepInputs
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.request import Sequence, Status
from tokenmill.engine.step import Step

logger = logging.getLogger("tokenmill.engine")
CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""What models call the cache that they return, and take back by the same name."""
PROMPT, TEXT = 6, 9  # tokens of the text by which a cache is tried: in the first call, and in all
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.05
"""Differences to expect of a right cache, as a share of the logits' norm: kernels of prompts and of single
tokens round differently. A wrong cache is off by 0.2 and more."""


@dataclass(slots=True)
class _Text:
    """What a slot's sequence has gone through: its tokens [T] and, where there is one, the model's cache."""

    owner: Sequence | None
    ids: Tensor
    cache: Any = None


class SequentialModel:
    """Runs steps on `module`, a causal LM in its own attention implementation.

    Raises LoadError for one that can't be run on token ids alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._texts: dict[int, _Text] = {}
        parameters = inspect.signature(module.forward).parameters
        takes_any = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
        self._uncached = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), None)
        if not self._cache_is_right():
            self._cache_name = None
            logger.warning(
                "%s has no cache of its own that gives what recomputation gives: "
                "every token computes its whole text anew",
                type(module).__name__,
            )

    @property
    def keeps_cache(self) -> bool:
        """Whether the model's own cache is used."""
        return self._cache_name is not None

    def start(self, slot: int) -> None:
        """A new sequence takes the slot: what the last one left is dropped."""
        self._texts.pop(slot, None)

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor:
        """Logits [S + N, V] of the rows `inputs.logits_index`, in that order."""
        self._forget_finished()
        borders = inputs.query_start.tolist()
        wanted = inputs.logits_index
        rows: Tensor | None = None
        for chunk, first, last in zip(step.chunks, borders, borders[1:], strict=False):
            sequence = chunk.sequence
            if chunk.start == 0:
                self._texts[sequence.slot] = _Text(sequence, inputs.input_ids[:0])
            logits = self._run(self._texts[sequence.slot], inputs.input_ids[first:last])
            for child in chunk.samplers[1:]:
                text = self._texts[sequence.slot]
                self._texts[child.slot] = _Text(child, text.ids, copy.deepcopy(text.cache))
            here = ((wanted >= first) & (wanted < last)).nonzero().flatten()
            if rows is None:
                rows = logits.new_empty(len(wanted), logits.shape[-1])
            rows[here] = logits[wanted[here] - first]
        assert rows is not None, "a step has at least one chunk"
        return rows

    def _forget_finished(self) -> None:
        """Free what no running sequence owns."""
        for slot, text in list(self._texts.items()):
            if text.owner is None or text.owner.status is Status.FINISHED or text.owner.slot != slot:
                del self._texts[slot]

    def _run(self, text: _Text, ids: Tensor) -> Tensor:
        """Logits [T, V] of tokens `ids` [T], which follow what `text` holds and join it."""
        if self._cache_name is None:
            text.ids = torch.cat([text.ids, ids])
            return self._whole(text.ids)[-len(ids) :]
        # With something in the cache already, single tokens are all that every kind of cache takes.
        parts = [ids] if text.cache is None else torch.split(ids, 1)
        logits = []
        for part in parts:
            own = {} if text.cache is None else {self._cache_name: text.cache}
            output = self._module(input_ids=part[None], use_cache=True, **own)
            text.cache = getattr(output, self._cache_name)
            logits.append(output.logits[0])
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _whole(self, ids: Tensor) -> Tensor:
        """Logits [T, V] of all tokens [T] of a text, without a cache."""
        logits: Tensor = self._module(input_ids=ids[None], **self._uncached).logits[0]
        return logits

    @torch.inference_mode()
    def _cache_is_right(self) -> bool:
        """Whether a short text's last logits are the same by the model's cache as by recomputation."""
        module: Any = self._module
        vocabulary = int(module.config.get_text_config(decoder=True).vocab_size)
        device = next(module.parameters()).device
        ids = (torch.arange(TEXT, device=device) * 7 + 3) % vocabulary
        try:
            wanted = [self._whole(ids[:PROMPT])[-1].float(), self._whole(ids)[-1].float()]
        except Exception as error:  # a model that wants more than tokens says so in its own way
            raise LoadError(
                f"a {type(module).__name__} doesn't run on token ids alone ({first_line(error)})"
            ) from None
        if self._cache_name is None:
            return False
        try:
            text = _Text(None, ids[:0])
            found = [self._run(text, ids[:PROMPT])[-1].float()]
            for token in torch.split(ids[PROMPT:], 1):
                if text.cache is None:
                    return False
                found[1:] = [self._run(text, token)[-1].float()]
        except Exception as error:
            logger.info("%s fails with its own cache: %s", type(module).__name__, first_line(error))
            return False
        tolerance = TOLERANCE.get(next(module.parameters()).dtype, HALF_TOLERANCE)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
        return all(error <= tolerance for error in errors)
