"""Thoughts between tags: kept apart from the answer, in any pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.server.reasoning import ReasoningParser, Tags, find_tags, is_open

TAGS = Tags("<think>", "</think>")


def read(opened: bool, pieces: Sequence[str]) -> tuple[str, str, int | None]:
    """Thoughts, answer, and the length of the thoughts' part."""
    parser = ReasoningParser(TAGS, opened)
    parts = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts), parser.length


@pytest.mark.parametrize(
    ("opened", "text", "thoughts", "answer"),
    [
        (False, "<think>\nHm.\nWell.\n</think>\n\nYes.\n", "Hm.\nWell.", "Yes.\n"),
        (False, "\n<think>Hm.</think>Yes.", "Hm.", "Yes."),
        (True, "Hm. </think> Yes.", "Hm.", "Yes."),
        (True, "Hm. ", "Hm.", ""),
        (True, "Hm. </thi", "Hm. </thi", ""),
        (False, "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        (False, " Yes.", "", " Yes."),
        (False, "<thi", "", "<thi"),
        (False, "<thing> is", "", "<thing> is"),
        (False, "<think></think>Yes.", "", "Yes."),
        (True, "</think>", "", ""),
        (False, "", "", ""),
        (True, "a </think> b </think> c", "a", "b </think> c"),
    ],
)
def test_thoughts_and_answer(opened: bool, text: str, thoughts: str, answer: str) -> None:
    assert read(opened, [text])[:2] == (thoughts, answer)
    assert read(opened, list(text)) == read(opened, [text])


def test_length_runs_through_the_closing_tag() -> None:
    assert read(True, ["Hm.</think> Yes"])[2] == len("Hm.</think>")
    assert read(False, ["Yes"])[2] == 0
    assert read(True, ["Hm."])[2] is None


PARTS = st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", " ", "\n", "a", "b c", "<", ">"])


@given(st.lists(PARTS, max_size=8), st.booleans(), st.lists(st.integers(0, 40), max_size=6))
def test_any_split_reads_as_the_whole(parts: list[str], opened: bool, cuts: list[int]) -> None:
    text = "".join(parts)
    places = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert read(opened, pieces) == read(opened, [text])


def test_tags_are_read_from_the_template() -> None:
    assert find_tags("{{ content.split('</think>')[-1] }}") == TAGS
    assert find_tags("[THINK]{{ x }}[/THINK]") == Tags("[THINK]", "[/THINK]")
    assert find_tags("{{ messages }}") is None


def test_open_thoughts() -> None:
    assert is_open("<think>\nhm", TAGS)
    assert not is_open("<think>hm</think> a", TAGS)
    assert not is_open("a", TAGS)
