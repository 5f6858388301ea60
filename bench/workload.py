"""What is asked for in a measurement: prompts, and how many tokens each shall yield.

Every prompt is random and unlike the others, so that no prefix cache helps anybody, and every run of one seed
asks for the same. Three distributions of lengths:

    fixed       each prompt and each output as long as the next
    nano-vllm   both uniform over 100..1024, as in that project's benchmark
    sharegpt    log-normal, like conversations between people and chat models
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["fixed", "nano-vllm", "sharegpt"]
Form = Literal["ids", "text"]

# ShareGPT's means are 161 prompt and 338 output tokens (Kwon et al., Efficient Memory Management for Large
# Language Model Serving with PagedAttention, 2023, section 6.1). The medians below give these means once
# lengths outside 4..1024 are drawn again; the spreads are our reading of the distributions' tails there.
SHAREGPT_PROMPT = (98.0, 1.2)
SHAREGPT_OUTPUT = (305.0, 0.9)
SHAREGPT_RANGE = range(4, 1025)
NANO_VLLM_RANGE = (100, 1024)

TOKEN_IDS = range(1000, 10_000)
"""Ids that nearly every vocabulary has; the lowest ones are often special."""

_WORD_LIST = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community "
    "name president team minute idea body information back parent face level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force "
    "education foot boy age policy music market sense nation plan college interest death experience "
    "effect class control field development role effort rate heart drug show"
)
WORDS = _WORD_LIST.split()
"""Words that are one token each in most vocabularies, with the space before them."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt, `prompt_tokens` long (text: about that), and the tokens that it generates."""

    prompt: list[int] | str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A recipe for jobs. `prompt_tokens` and `output_tokens` are those of `fixed`."""

    kind: Kind = "fixed"
    prompt_tokens: int = 128
    output_tokens: int = 128
    form: Form = "ids"
    token_ids: range = TOKEN_IDS

    def jobs(self, count: int, seed: int) -> list[Job]:
        """`count` jobs, the same for the same seed; different seeds share no prompt."""
        rng = random.Random(seed)
        lengths = [self._lengths(rng) for _ in range(count)]
        return [Job(self._prompt(rng, prompt), prompt, output) for prompt, output in lengths]

    @property
    def most_tokens(self) -> int:
        """Prompt and output of the longest possible job."""
        if self.kind == "fixed":
            return self.prompt_tokens + self.output_tokens
        return 2 * (NANO_VLLM_RANGE[1] if self.kind == "nano-vllm" else SHAREGPT_RANGE[-1])

    @property
    def name(self) -> str:
        """`fixed 128+128`, `sharegpt`, …"""
        lengths = f" {self.prompt_tokens}+{self.output_tokens}" if self.kind == "fixed" else ""
        return f"{self.kind}{lengths}{', text' if self.form == 'text' else ''}"

    def _lengths(self, rng: random.Random) -> tuple[int, int]:
        if self.kind == "fixed":
            return self.prompt_tokens, self.output_tokens
        if self.kind == "nano-vllm":
            return rng.randint(*NANO_VLLM_RANGE), rng.randint(*NANO_VLLM_RANGE)
        return _log_normal(rng, *SHAREGPT_PROMPT), _log_normal(rng, *SHAREGPT_OUTPUT)

    def _prompt(self, rng: random.Random, length: int) -> list[int] | str:
        if self.form == "text":
            return " ".join(rng.choices(WORDS, k=length))
        return rng.choices(self.token_ids, k=length)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `from_arguments` reads."""
    group = parser.add_argument_group("workload")
    group.add_argument("--workload", choices=get_args(Kind), default="fixed", help="distribution of lengths")
    group.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of fixed (default 128)")
    group.add_argument("--output-tokens", type=int, default=128, metavar="N", help="of fixed (default 128)")
    group.add_argument(
        "--prompts",
        choices=get_args(Form),
        default="ids",
        help="random token ids, or text of about that length",
    )
    group.add_argument("--seed", type=int, default=0, help="another seed, other prompts and lengths")


def from_arguments(args: argparse.Namespace, token_ids: range = TOKEN_IDS) -> Workload:
    """The workload that the options describe. Raises ValueError for lengths below 1."""
    if args.prompt_tokens < 1 or args.output_tokens < 1:
        raise ValueError("--prompt-tokens and --output-tokens must be at least 1")
    return Workload(args.workload, args.prompt_tokens, args.output_tokens, args.prompts, token_ids)


def _log_normal(rng: random.Random, middle: float, spread: float) -> int:
    while True:
        length = round(rng.lognormvariate(math.log(middle), spread))
        if length in SHAREGPT_RANGE:
            return length
