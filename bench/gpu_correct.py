"""Whether a GPU computes what it should: kernels, texts and logits beside slower twins of theirs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenmill.bench.gpu_models import build_module, make_engine, shrunk
from tokenmill.bench.gpu_runner import Check

if TYPE_CHECKING:
    from tokenmill.engine.engine import Engine

MOST_ERROR = 2.0
"""Times transformers' own bfloat16 error that ours may be."""


def check_kernels(check: Check) -> None:
    """Every kernel against its twin, those of a kind together."""
    from tokenmill.kernels.gpu.selfcheck import check_groups, rehearse_groups

    check.compile_ahead("kernels", lambda: rehearse_groups(check.device, check.seed))
    for name, results in check_groups(check.device, check.seed).items():
        check.attempt(f"kernels: {name}", partial(_check_group, check, results))


def _check_group(check: Check, results: Iterator[Any]) -> None:
    count, last = 0, "the first"
    try:
        for result in results:
            count, last = count + 1, result.name
            check.row("kernels", {**dataclasses.asdict(result), "passed": result.passed})
            if not result.passed:
                check.fail(f"kernel {last}: error {result.error:.2e}, allowed {result.tolerance:.0e}")
    except Exception as error:
        raise RuntimeError(
            f"after {count} checks, {last} the last: {type(error).__name__}: {error}"
        ) from error
    print(f"  {count} checks", flush=True)


def check_texts(check: Check) -> None:
    """Greedy text of tiny float32 models, and seeded text in batches of several sizes."""
    for name, fields in check.sizes.shapes.items():
        check.attempt(f"{name}, tiny: texts", partial(_check_text, check, name, fields))


def _check_text(check: Check, name: str, fields: dict[str, Any]) -> None:
    import torch

    from tokenmill.engine.sampling_params import SamplingParams

    on_gpu = check.device.type == "cuda"
    count, generator = 24 if on_gpu else 3, random.Random(check.seed)
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    seeded = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=count, ignore_eos=True)
    small = shrunk(fields)
    if on_gpu:
        small |= {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    engine = make_engine(small, check.device, torch.float32, max_context=256, max_batch=4, num_blocks=80)
    prompts = [[generator.randrange(10, 320) for _ in range(length)] for length in (1, 9, 17)]
    expected = _recomputed(build_module(small, check.device, torch.float32, "eager"), prompts, count)
    found = _generate(engine, prompts, [greedy] * len(prompts))
    if found != expected:
        same = [_agreed(*texts) for texts in zip(found, expected, strict=True)]
        check.fail(f"{name}, tiny: greedy texts agree with full recomputation for {same} of {count} tokens")
    alone = _generate(engine, prompts[:1], [seeded])[0]
    crowd = _generate(engine, [*prompts[1:], prompts[0]], [greedy, greedy, seeded])[-1]
    if alone != crowd:
        agreed = _agreed(alone, crowd)
        check.fail(f"{name}, tiny: a seeded text changes with its batch after {agreed} of {count} tokens")


def _agreed(one: list[int], other: list[int]) -> int:
    """How many leading tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def _recomputed(module: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    import torch

    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(count):
                logits = module(torch.tensor([ids], device=module.device), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            texts.append(ids[len(prompt) :])
    return texts


def _generate(engine: Engine, prompts: list[list[int]], params: list[Any]) -> list[list[int]]:
    from tokenmill.engine.messages import Add

    texts: list[list[int]] = [[] for _ in prompts]
    for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        engine.add(Add(number, prompt, one))
    while engine.has_work:
        for delta in engine.step():
            if delta.error is not None:
                raise RuntimeError(delta.error)
            texts[delta.request] += delta.token_ids
    return texts


def check_logits(check: Check, name: str, fields: dict[str, Any], engine: Engine) -> None:
    """Our error against float32 on one text, prefill and decodes, beside transformers' in the same dtype."""
    import torch

    from tokenmill.engine.forward import PagedForward

    assert isinstance(engine.runner.forward, PagedForward)
    length, dtype = check.sizes.text, getattr(torch, check.sizes.dtype)
    generator = torch.Generator().manual_seed(check.seed)
    ids = torch.randint(0, fields["vocab_size"], (length,), generator=generator).to(check.device)
    half = length // 2
    ours = engine.runner.forward.teacher_forced(ids, [half, length - half - 3, 1, 1, 1]).float()
    module = build_module(fields, check.device, dtype, "sdpa")
    with torch.inference_mode():
        theirs = module(ids[None], use_cache=False).logits[0].float()
        module.float()
        wanted = module(ids[None], use_cache=False).logits[0]
    errors = [float((x - wanted).norm() / wanted.norm()) for x in (ours, theirs)]
    agree = [float((x.argmax(-1) == wanted.argmax(-1)).float().mean()) for x in (ours, theirs)]
    row = {
        "model": name,
        "error": errors[0],
        "transformers_error": errors[1],
        "top_1": agree[0],
        "transformers_top_1": agree[1],
    }
    check.row("logits", row)
    print(
        f"  error {errors[0]:.2e}, transformers {errors[1]:.2e}; same top token {agree[0]:.3f}, {agree[1]:.3f}"
    )
    if not errors[0] <= max(MOST_ERROR * errors[1], 1e-5):
        check.fail(f"{name}: logits are off by {errors[0]:.2e}, transformers' by {errors[1]:.2e}")
