"""What became of a step: tokens to their sequences, sequences to their ends, and word of it to who asked.

Result ─▶ verify drafts ─▶ append ─▶ grammar ─▶ stop? ─▶ Delta          a row of NaN: error, that sequence alone
                                       └ no ─▶ the scheduler goes on with it
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import islice

from tokenmill.engine.messages import Delta, FinishReason
from tokenmill.engine.model_runner import Draw, Result, Run
from tokenmill.engine.ngram_proposer import MATCH, Proposer
from tokenmill.engine.request import Sequence, Status
from tokenmill.engine.sampler import Sampler
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.step import Chunk

NO_LOGITS = "the model produced no finite logits"


class Delivery:
    """The sequences of all requests, from their arrival to their last word."""

    def __init__(self, scheduler: Scheduler, sampler: Sampler, eos_ids: Collection[int]) -> None:
        self.requests: dict[int, list[Sequence]] = {}
        """Choices by request; a request is here until all of its have finished."""
        self.prompt_tokens = 0
        """Computed so far; those that came from the cache don't count."""
        self.cached_tokens = 0
        self.generated_tokens = 0
        self._scheduler = scheduler
        self._sampler = sampler
        self._eos_ids = eos_ids
        self._deltas: list[Delta] = []

    def take(self) -> list[Delta]:
        """The news since the last call."""
        deltas, self._deltas = self._deltas, []
        return deltas

    # ---------------------------------------------------------------- a step's results

    def record(self, run: Run, result: Result) -> None:
        """Give each sequence of a step what was drawn for it, and send word of it."""
        for sequence, scores in result.scores:
            if sequence.status is Status.FINISHED:
                continue
            if any(map(math.isnan, scores.values)):
                self.fail(sequence, NO_LOGITS)
                continue
            self._deltas.append(Delta(sequence.request, sequence.choice, [], prompt_logprobs=scores))
        draws, size = iter(result.draws), self._scheduler.pool.block_size
        for chunk in run.step.chunks:
            sequence, drafts = chunk.sequence, len(chunk.drafts)
            stop = chunk.start + chunk.count - drafts
            drawn = [list(islice(draws, 1 + drafts)) for _ in chunk.samplers]
            if chunk.start < len(sequence.prompt):
                self.prompt_tokens += min(stop, len(sequence.prompt)) - chunk.start
            if stop // size > sequence.committed and not (drawn and any(draw.bad for draw in drawn[0])):
                self._scheduler.commit(sequence, stop)
            if stop == len(sequence.prompt) and sequence.params.max_tokens == 0:
                self._end(sequence)
            for sampler, own in zip(chunk.samplers, drawn, strict=True):
                if sampler.status is not Status.FINISHED:
                    self._record(sampler, own if not drafts else self._verify(chunk, own))

    def _verify(self, chunk: Chunk, draws: list[Draw]) -> list[Draw]:
        """The draws that count: each one whose drafts before it were all drawn too."""
        accepted = 0
        while accepted < len(chunk.drafts) and draws[accepted].token == chunk.drafts[accepted]:
            accepted += 1
        self._scheduler.settle(chunk, accepted)
        return draws[: accepted + 1]

    def _record(self, sequence: Sequence, draws: list[Draw]) -> None:
        if any(draw.bad for draw in draws):
            restricted = sequence.matcher is not None or bool(sequence.params.logit_bias)
            reason = "the grammar and logit_bias leave no token to choose" if restricted else NO_LOGITS
            self.fail(sequence, reason, invalid=restricted)
            return
        if self._scheduler.suspects:
            self._scheduler.cleared(sequence)
        delta = Delta(sequence.request, sequence.choice, [])
        for draw in draws:
            self._scheduler.append(sequence, draw.token)
            delta.token_ids.append(draw.token)
            if draw.logprob is not None and draw.top is not None:
                delta.logprobs = [*(delta.logprobs or ()), draw.logprob]
                delta.top = [*(delta.top or ()), draw.top]
            if sequence.matcher is not None and not sequence.matcher.consume([draw.token]):
                reason = f"the grammar can't go on: {sequence.matcher.error}"
                self.fail(sequence, reason, invalid=True)
                return
            delta.finish = self._reason_to_stop(sequence, draw.token)
            if delta.finish is not None:
                break
        self.generated_tokens += len(delta.token_ids)
        if delta.finish == "stop" and self._ends(sequence, delta.token_ids[-1]):
            delta.stop_token = delta.token_ids[-1]
        if sequence.proposer is not None:
            self._teach(sequence, sequence.proposer, delta)
        self._send(sequence, delta)
        if delta.finish is not None:
            self.finish(sequence, delta.finish)

    def _teach(self, sequence: Sequence, proposer: Proposer, delta: Delta) -> None:
        """Tell the proposer and the counters what became of the drafts."""
        new, total = len(delta.token_ids), sequence.num_tokens - sequence.pending
        proposer.extend(sequence.tokens(max(0, total - new - MATCH), total), new)
        delta.accepted_drafts, delta.rejected_drafts = sequence.accepted_drafts, sequence.rejected_drafts
        if sequence.accepted_drafts + sequence.rejected_drafts:
            proposer.feedback(sequence.accepted_drafts + sequence.rejected_drafts, sequence.accepted_drafts)
            sequence.accepted_drafts = sequence.rejected_drafts = 0
            if sequence.slot >= 0:
                self._sampler.count(sequence.slot, delta.token_ids)

    def _reason_to_stop(self, sequence: Sequence, token: int) -> FinishReason | None:
        length, params = len(sequence.output), sequence.params
        if length > params.min_tokens and self._ends(sequence, token):
            return "stop"
        if sequence.matcher is not None and sequence.matcher.stopped:
            return "stop"
        return "length" if length >= params.max_tokens else None

    def _ends(self, sequence: Sequence, token: int) -> bool:
        """Whether this token is an end of text or a stop id of the request."""
        params = sequence.params
        return (token in self._eos_ids and not params.ignore_eos) or token in params.stop_token_ids

    def _send(self, sequence: Sequence, delta: Delta) -> None:
        if sequence.choice == 0 and not sequence.announced:
            sequence.announced = True
            delta.cached_tokens = sequence.cached_tokens or 0
            self.cached_tokens += delta.cached_tokens
        self._deltas.append(delta)

    # ---------------------------------------------------------------- ends

    def _end(self, sequence: Sequence) -> None:
        """Finish a sequence that draws nothing (max_tokens 0), and the children that waited for it."""
        if sequence.status is Status.FINISHED:
            return
        for one in [sequence, *sequence.children]:
            self._send(one, Delta(one.request, one.choice, [], finish="length"))
        self._finish_all(sequence, "length")

    def fail(self, sequence: Sequence, reason: str, *, invalid: bool = False) -> None:
        """End a sequence with an error, and the children that wait for it. `invalid`: the request is at fault."""
        for one in [sequence, *sequence.children]:
            delta = Delta(one.request, one.choice, [], finish="error", error=reason, invalid=invalid)
            self._deltas.append(delta)
        self._finish_all(sequence, "error")

    def _finish_all(self, sequence: Sequence, reason: FinishReason) -> None:
        for one in [sequence, *self.finish(sequence, reason)]:
            self.finish(one, reason)

    def finish(self, sequence: Sequence, reason: FinishReason) -> list[Sequence]:
        """End a sequence without a word; the children that waited for it and must go on alone."""
        if sequence.status is Status.FINISHED:
            return []
        orphans = self._scheduler.finish(sequence, reason)
        choices = self.requests.get(sequence.request, [])
        if all(choice.status is Status.FINISHED for choice in choices):
            self.requests.pop(sequence.request, None)
        return orphans
