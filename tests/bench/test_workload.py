"""Lengths and prompts of the benchmark's requests."""

from __future__ import annotations

import argparse

import pytest

from tokenmill.bench import workload
from tokenmill.bench.workload import TOKEN_IDS, Kind, Workload


@pytest.mark.parametrize("kind", ["fixed", "nano-vllm", "sharegpt"])
def test_one_seed_one_workload(kind: Kind) -> None:
    work = Workload(kind)
    assert work.jobs(20, seed=3) == work.jobs(20, seed=3)
    assert work.jobs(20, seed=3) != work.jobs(20, seed=4)


def test_no_two_prompts_share_a_beginning() -> None:
    jobs = [job for seed in range(20) for job in Workload().jobs(50, seed)]
    beginnings = {tuple(job.prompt[:16]) for job in jobs}
    assert len(beginnings) == len(jobs)


def test_fixed_lengths() -> None:
    jobs = Workload(prompt_tokens=17, output_tokens=5).jobs(8, seed=0)
    assert {(len(job.prompt), job.prompt_tokens, job.output_tokens) for job in jobs} == {(17, 17, 5)}
    assert all(token in TOKEN_IDS for job in jobs for token in job.prompt)


def test_nano_vllm_lengths_cover_their_range() -> None:
    jobs = Workload("nano-vllm").jobs(2000, seed=0)
    for lengths in ([job.prompt_tokens for job in jobs], [job.output_tokens for job in jobs]):
        assert 100 <= min(lengths) < 120
        assert 1000 < max(lengths) <= 1024
        assert sum(lengths) / len(lengths) == pytest.approx(562, rel=0.05)


def test_sharegpt_lengths_have_the_published_means() -> None:
    jobs = Workload("sharegpt").jobs(20_000, seed=0)
    prompts, outputs = [job.prompt_tokens for job in jobs], [job.output_tokens for job in jobs]
    assert sum(prompts) / len(prompts) == pytest.approx(161, rel=0.03)
    assert sum(outputs) / len(outputs) == pytest.approx(338, rel=0.03)
    assert min(prompts) >= 4
    assert max(prompts + outputs) <= 1024


def test_text_prompts_have_a_word_a_token() -> None:
    for job in Workload("sharegpt", form="text").jobs(50, seed=1):
        assert isinstance(job.prompt, str)
        assert len(job.prompt.split(" ")) == job.prompt_tokens


@pytest.mark.parametrize("kind", ["fixed", "nano-vllm", "sharegpt"])
def test_most_tokens_bounds_every_job(kind: Kind) -> None:
    work = Workload(kind)
    assert max(job.prompt_tokens + job.output_tokens for job in work.jobs(5000, seed=2)) <= work.most_tokens


def test_options_make_the_workload() -> None:
    parser = argparse.ArgumentParser()
    workload.add_arguments(parser)
    args = parser.parse_args(["--prompt-tokens", "9", "--output-tokens", "3", "--prompts", "text"])
    assert workload.from_arguments(args) == Workload("fixed", 9, 3, "text")
    assert workload.from_arguments(args).name == "fixed 9+3, text"
    with pytest.raises(ValueError, match="at least 1"):
        workload.from_arguments(parser.parse_args(["--output-tokens", "0"]))
