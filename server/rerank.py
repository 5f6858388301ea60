"""A suffix for models without tokens for it: of several candidates the ones after which it is likeliest.

    prompt ──▶ candidates ──▶ prompt + candidate + suffix, scored ──▶ ranked by the suffix's log-probability

Every candidate is followed by the same suffix tokens, so their sum ranks as their mean would.
"""

from __future__ import annotations

from tokenmill.engine.sampling_params import SamplingParams
from tokenmill.server.admission import Job
from tokenmill.server.fim import encode_inside
from tokenmill.server.generation import Choice, Generation
from tokenmill.server.prompts import PromptInput, by_size

SCORING = SamplingParams(max_tokens=0, prompt_logprobs=0)


async def rank_by_suffix(generation: Generation) -> None:
    """Order the choices of a finished generation where its job has a suffix; nothing to do otherwise."""
    job = generation.job
    if job.suffix is None or job.params.candidates == 1:
        return
    choices = [choice for run in generation.runs for choice in run.choices]
    texts = sum(len(choice.detokenizer.text) for choice in choices)
    prompts = await by_size(texts, _prompts, generation, choices, job.suffix)
    scoring = generation.part(Job(prompts, SCORING, job.priority, job.cache_salt))
    try:
        scoring.start()
        await scoring.finished()
    finally:
        scoring.close()
    scores = {
        choice: sum(run.scores[-len(job.suffix) :]) for choice, run in zip(choices, scoring.runs, strict=True)
    }
    for run in generation.runs:
        run.ranked = sorted(run.choices, key=lambda choice: -scores[choice])


def _prompts(generation: Generation, choices: list[Choice], suffix: list[int]) -> list[PromptInput]:
    """What to score: the text that the client would get, encoded anew, since a stop may have cut a token."""
    most = generation.job.params.max_tokens
    tokenizer = generation.engine.tokenizer
    return [
        PromptInput(choice.run.prompt.ids + encode_inside(tokenizer, choice.detokenizer.text)[:most] + suffix)
        for choice in choices
    ]
