"""A request and its sequences: what is known of each token, and what the cache already holds.

prompt | output | pending        tokens, in order; pending ones are being sampled and not yet known here
───────────┤                     num_computed: keys and values of that many are in the cache, or will be
           └ decode: exactly one token is uncomputed          once the launched steps have run
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tokenmill.engine.block_pool import ContentName
from tokenmill.engine.grammar import Matcher
from tokenmill.engine.messages import Add, FinishReason
from tokenmill.engine.ngram_proposer import Proposer
from tokenmill.engine.sampling_params import SamplingParams, derive_seed


class Status(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. `eq=False`: a sequence is itself, whatever it holds."""

    request: int
    choice: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    arrival: int
    priority: int = 0
    salt: str = ""
    status: Status = Status.WAITING
    output: list[int] = field(default_factory=list)
    pending: int = 0
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    committed: int = 0
    """Leading blocks whose content is named in the pool."""
    content: ContentName = ""
    """Name of the last committed block's content; the salt while there is none."""
    shared_until: int = 0
    """How many of its first tokens another request had too, where no copy of a state was to be found."""
    saves: list[tuple[int, int]] = field(default_factory=list)
    """Copies of its state that aren't known by name yet: (tokens that it follows, line)."""
    trail: ContentName | None = None
    """Name of the last copy of its state that was made along its output."""
    slot: int = -1
    """Row of the runner's persistent state while running."""
    children: list[Sequence] = field(default_factory=list)
    """Choices that wait for this one's prefill, to take over its prompt blocks."""
    cached_tokens: int | None = None
    announced: bool = False
    """Whether `cached_tokens` was delivered."""
    prompt_scored: int = 1
    """Prompt positions below this have had their log-probabilities delivered."""
    proposer: Proposer | None = None
    matcher: Matcher | None = None
    verifying: bool = False
    """A step with drafts is under way; nothing more can be scheduled before its outcome is known."""
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    finish: FinishReason | None = None
    preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt, output and pending tokens."""
        return len(self.prompt) + len(self.output) + self.pending

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far, pending ones included: the position of the next one's noise."""
        return len(self.output) + self.pending

    @property
    def uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def order(self) -> tuple[int, int, int]:
        """Who comes first: priority, then arrival, then choice."""
        return (self.priority, self.arrival, self.choice)

    @property
    def wants_token(self) -> bool:
        """Whether one more token may be sampled, as far as lengths tell."""
        return self.num_generated < self.params.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether the next chunk has prompt positions whose log-probabilities are wanted."""
        return self.params.prompt_logprobs is not None and self.num_computed < len(self.prompt)

    @property
    def reads_cache(self) -> bool:
        """Prompt log-probabilities need every position computed, so such requests never read the cache."""
        return self.params.prompt_logprobs is None

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens `start` to `stop`."""
        border = len(self.prompt)
        if stop <= border:
            return self.prompt[start:stop]
        if start >= border:
            return self.output[start - border : stop - border]
        return self.prompt[start:] + self.output[: stop - border]


def make_sequences(message: Add, seed: int, arrival: int, *, ngram: bool = False) -> Sequence:
    """The first choice of a request, with its other choices as children; each draws from its own stream.

    `ngram`: draft from the request's own text where it brings no prediction.
    """
    params, prompt = message.params, message.prompt
    choices = [
        Sequence(
            message.request,
            choice,
            prompt,
            params,
            derive_seed(seed, choice),
            arrival,
            message.priority,
            message.cache_salt,
        )
        for choice in range(params.candidates)
    ]
    if message.prediction is not None or ngram:
        for sequence in choices:
            sequence.proposer = Proposer(message.prediction, prompt)
    choices[0].children = choices[1:]
    return choices[0]
