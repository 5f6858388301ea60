"""The fused decoder over several ranks, each with its part of every matrix and of the KV cache.

    rank 0   prepare ─▶ RankStep to the others ─▶ forward of its part ─▶ logits, whole ─▶ sample
    rank r                └▶ forward of its part          ║ sums          ║ its logits
                                                  two a layer        one a step

Only rank 0 schedules and samples. The others learn of a step by a message from host to host and launch the same
kernels at the same time; token ids that rank 0 has on its device alone are sent from device to device. So a step
may be launched before the last one's tokens are read, as on one GPU.

An exception in the middle of a step leaves the others waiting in a sum that never comes: the model is lost
(`RanksLost`). It ends its processes, and the front end starts them again. Decode steps aren't captured in CUDA graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tokenmill.engine import attention
from tokenmill.engine.attention import Kept
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.decoder import Decoder, Sum
from tokenmill.engine.describe import describe
from tokenmill.engine.forward import ModelLogits, PagedForward
from tokenmill.engine.input_batch import StepInputs, pairs
from tokenmill.engine.kernel_set import Product, ReferenceKernels
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.rank_link import NoRoom, RanksLost, RankStep
from tokenmill.engine.ranks import Ranks
from tokenmill.engine.shard import Share, shard
from tokenmill.engine.staging import Staging
from tokenmill.engine.step import Step


class Together:
    """How the ranks' results come together (decoder.Spread)."""

    def __init__(self, ranks: Ranks, width: int) -> None:
        """`width`: how many logits there are in all."""
        self._ranks = ranks
        self._width = width

    def summed(self, partial_sum: Sum) -> Sum:
        """All ranks' sums added up; the residual goes into rank 0's."""
        ranks, first = self._ranks, self._ranks.rank == 0
        return lambda x, residual: ranks.add_up(partial_sum(x, residual if first else None))

    def joined(self, head: Product) -> Product:
        """All ranks' logits [N, width] on rank 0; the others' results are their own, of no use."""
        ranks, width = self._ranks, self._width

        def product(x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
            own = head(x, residual)
            parts = ranks.gather(own)
            if not parts:
                return own
            return torch.cat([part[:, : width - at] for at, part in _places(parts)], dim=1, out=out)

        return product


def _places(parts: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each part with the column that it begins at."""
    at = 0
    for part in parts:
        yield at, part
        at += part.shape[1]


class ParallelForward(PagedForward):
    """One rank's part of a model. All ranks make theirs at the same time: they meet once the weights are there."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        kernels: ReferenceKernels,
        ranks: Ranks,
        arrive: Callable[[], None],
        tell: Callable[[RankStep], None] | None = None,
    ) -> None:
        """`arrive` is called when this rank has its weights, before it waits for the others.

        `tell` sends a step to the others: rank 0's, which is called; the others `follow` it.
        """
        self._ranks = ranks
        self._arrive = arrive
        self._tell = tell
        self._staging = Staging(model.device)
        super().__init__(model, config, kernels)

    def _build(self, model: LoadedModel, config: EngineConfig) -> tuple[ModelLogits, str, list[Kept]]:
        form, module, size = model.verdict.decoder, model.module, self._ranks.size
        assert module is not None
        if form is None or not config.fused_decoder:
            raise LoadError(
                f"{config.source}: tensor_parallel needs the fused decoder, which doesn't run a "
                f"{model.model_type}; leave it out"
            )
        attended = attention.probe_layers(module, multiply=False)
        described = describe(module, attended, model.max_context, form == "interleaved")
        model.module = module = None
        self._kernels.own_threads()
        try:
            layers = shard(described, Share(self._ranks.rank, size), model.device)
            decoder = Decoder(described, self._kernels, Together(self._ranks, model.logits_width))
        except LoadError as error:
            raise LoadError(f"{config.source}: {error}") from None
        except torch.OutOfMemoryError:
            raise LoadError(
                f"{config.source}: a rank's part of its weights doesn't fit into the memory of {model.device}"
            ) from None
        gc.collect()  # what was read whole is to be gone before another rank reads it
        self._arrive()
        self._ranks.meet()
        uncaptured = ", decode steps without CUDA graphs" if model.device.type == "cuda" else ""
        return decoder, f"fused decoder, {self._kernels.name} kernels, {size} ranks{uncaptured}", layers

    def _count_blocks(
        self, model: LoadedModel, config: EngineConfig, dtype: torch.dtype, activations: int
    ) -> int:
        """As many blocks as the rank with the least room has; each rank speaks before one gives up."""
        reason = f"{config.source}: another rank has no room for a KV cache"
        try:
            blocks = super()._count_blocks(model, config, dtype, activations)
        except MemoryError as error:
            blocks, reason = 0, str(error)
        blocks = self._ranks.least(blocks)
        if not blocks:
            raise NoRoom(reason)
        return blocks

    @property
    def can_be_captured(self) -> bool:
        return False

    def _speed_up(self, dtype: torch.dtype) -> None:
        """Nothing to do: a step that is one call has no place to wait for other ranks in."""

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor:
        assert self._tell is not None
        try:
            host = [array.tobytes() for array in inputs.host]
            self._tell(RankStep(host, inputs.decodes, inputs.carried is not None, step.copies))
            if inputs.carried is not None:
                self._ranks.share(inputs.input_ids)
            return super().__call__(step, inputs)
        except Exception as error:
            raise RanksLost("a step failed while other ranks were in it") from error

    def follow(self, step: RankStep) -> None:
        """Do this rank's part of a step."""
        ids, positions, slots, table, lengths, starts, rows = self._staging.put(step.host_arrays())
        if step.carried:
            self._ranks.share(ids)
        metadata = self._metadata(slots, table, lengths, starts, step.decodes)
        self._logits(ids, positions, metadata, rows)
        if step.copies:
            self.copy_blocks(*self._staging.put(pairs(step.copies)))
