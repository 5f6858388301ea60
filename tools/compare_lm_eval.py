"""lm-evaluation-harness through the server and through its own `hf` backend, side by side.

    pip install "lm_eval[api]"
    tokenmill serve --model FOLDER --name local/model --dtype float32 &
    python tools/compare_lm_eval.py --url http://127.0.0.1:8000 --model local/model --checkpoint FOLDER

Both sides get the token ids that FOLDER's tokenizer makes. Exits 1 if a log-likelihood differs by
more than the tolerance (in nats) or an is_greedy differs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = ["tokenmill_choice", "tokenmill_perplexity"]


@dataclass(frozen=True)
class Score:
    """One request's answer: the log-likelihood in nats, and is_greedy (None for perplexity)."""

    loglikelihood: float
    is_greedy: bool | None


def score(response: Any) -> Score:
    """A sample's filtered response: `(loglikelihood, is_greedy)`, or the log-likelihood alone."""
    if isinstance(response, (list, tuple)):
        return Score(float(response[0]), str(response[1]) == "True")
    return Score(float(response), None)


def evaluate(backend: str, settings: dict[str, Any]) -> tuple[dict[str, list[Score]], dict[str, Any]]:
    """The scores of each task's requests in order, and the metrics that the harness made of them."""
    data = Path("tests/data/lm_eval")
    results = simple_evaluate(
        model=backend,
        model_args=settings,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(data), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        log_samples=True,
    )
    scores = {
        task: [
            score(response)
            for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
            for response in sample["filtered_resps"]
        ]
        for task in TASKS
    }
    return scores, results["results"]


def compare(task: str, served: list[Score], local: list[Score], tolerance: float) -> bool:
    """Prints a task's largest difference; whether all of its requests agree."""
    difference = max(abs(a.loglikelihood - b.loglikelihood) for a, b in zip(served, local, strict=True))
    flips = sum(a.is_greedy != b.is_greedy for a, b in zip(served, local, strict=True))
    greedy = sum(a.is_greedy is True for a in local)
    print(
        f"{task}: {len(local)} requests, largest difference {difference:.2e} nats, "
        f"is_greedy true {greedy}, different {flips}"
    )
    return difference <= tolerance and flips == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the running server")
    parser.add_argument("--model", required=True, help="the name that the server knows the model by")
    parser.add_argument(
        "--checkpoint", required=True, help="a folder with the same weights and the tokenizer"
    )
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference allowed, in nats")
    arguments = parser.parse_args()
    served, served_metrics = evaluate(
        "local-completions",
        {
            "model": arguments.model,
            "base_url": f"{arguments.url}/v1/completions",
            "tokenizer": arguments.checkpoint,
            "tokenizer_backend": "huggingface",
            "max_length": 1024,
        },
    )
    local, local_metrics = evaluate(
        "hf",
        {"pretrained": arguments.checkpoint, "dtype": "float32", "device": "cpu", "max_length": 1024},
    )
    for task in TASKS:
        print(f"{task}: served {served_metrics[task]}")
        print(f"{task}: hf     {local_metrics[task]}")
    agree = [compare(task, served[task], local[task], arguments.tolerance) for task in TASKS]
    raise SystemExit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
