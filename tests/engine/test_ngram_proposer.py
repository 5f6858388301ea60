"""Drafts: following a prediction, finding back to it, and giving up where it doesn't pay."""

from __future__ import annotations

from tokenmill.engine.ngram_proposer import LONGEST, Proposer


def run(proposer: Proposer, prompt: list[int], text: list[int], limit: int = LONGEST) -> tuple[int, int, int]:
    """Generate `text` with drafts: (steps, accepted drafts, rejected drafts)."""
    output: list[int] = []
    steps = right = wrong = 0
    while len(output) < len(text):
        drafts = proposer.propose(min(limit, len(text) - len(output) - 1))
        rest = text[len(output) :]
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == rest[accepted]:
            accepted += 1
        output += rest[: accepted + 1]
        proposer.extend(prompt + output, accepted + 1)
        proposer.feedback(len(drafts), accepted)
        steps, right, wrong = steps + 1, right + accepted, wrong + len(drafts) - accepted
    return steps, right, wrong


def test_a_perfect_prediction_is_followed_to_its_end() -> None:
    text = list(range(100, 300))
    steps, right, wrong = run(Proposer(text, [1, 2]), [1, 2], text)
    assert wrong == 0
    assert steps == len(text) - right <= len(text) // (LONGEST + 1) + 2


def test_one_replaced_token_costs_one_step() -> None:
    prediction = list(range(100, 300))
    text = [*prediction[:90], 7, *prediction[91:]]
    assert run(Proposer(prediction, []), [], text)[0] <= 200 // (LONGEST + 1) + 4


def test_inserted_and_deleted_tokens_are_found_past() -> None:
    prediction = list(range(100, 300))
    for text in ([*prediction[:50], 7, 8, 9, *prediction[50:]], prediction[:50] + prediction[70:]):
        steps, right, _ = run(Proposer(prediction, []), [], text)
        assert right > len(text) * 0.8
        assert steps < len(text) / 5


def test_a_useless_prediction_is_soon_ignored() -> None:
    text = list(range(1000, 1400))
    _, right, wrong = run(Proposer([1, 2, 3] * 100, []), [], text)
    assert right == 0
    assert wrong <= 20


def test_own_text_that_repeats_is_drafted() -> None:
    line = [5, 6, 7, 8, 9, 10, 11, 12]
    steps, _, _ = run(Proposer(None, line * 2), line * 2, line * 20)
    assert steps < len(line) * 20 / 4


def test_own_text_that_does_not_repeat_is_not() -> None:
    text = list(range(1000, 1200))
    assert run(Proposer(None, [1, 2, 3]), [1, 2, 3], text) == (200, 0, 0)


def test_no_more_than_the_limit() -> None:
    proposer = Proposer(list(range(50)), [])
    assert proposer.propose(0) == []
    assert proposer.propose(-3) == []
    assert len(proposer.propose(5)) == 5
