"""Texts are cut into utterances at sentences, within a bound, wherever the pieces of a stream begin and end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.utterances import Utterances

TEXTS = st.text(st.sampled_from("ab .,!?…\n\"')」。！，;—\t"), max_size=120)


def cut(text: str, places: list[int], longest: int = 20, shortest: int = 5) -> list[str]:
    utterances = Utterances(longest, shortest)
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    done = [part for start, end in itertools.pairwise(ends) for part in utterances.push(text[start:end])]
    return done + utterances.finish()


@given(text=TEXTS, places=st.lists(st.integers(0, 120), max_size=10))
def test_the_pieces_that_a_text_comes_in_change_nothing(text: str, places: list[int]) -> None:
    assert cut(text, places) == cut(text, [])


@given(text=TEXTS)
def test_every_character_is_spoken_once_and_no_utterance_is_too_long(text: str) -> None:
    utterances = cut(text, [])
    assert all(0 < len(utterance) <= 20 and utterance == utterance.strip() for utterance in utterances)
    assert "".join("".join(utterances).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\n ", []),
        ("One.", ["One."]),
        ("The first one. The second.", ["The first one.", "The second."]),
        ('He said: "Go now!" Then he left.', ['He said: "Go now!"', "Then he left."]),
        ("A value of 3.14159 is it.", ["A value of 3.14159 is it."]),
        ("Dr. Smith is in. He waits.", ["Dr. Smith is in.", "He waits."]),
        ("no stop here\nsecond line", ["no stop here", "second line"]),
        ("水車は川のそばにある。川が回す。", ["水車は川のそばにある。", "川が回す。"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert cut(text, [], longest=60, shortest=8) == expected


def test_a_long_sentence_is_cut_behind_a_clause_else_between_words_else_anywhere() -> None:
    assert cut("one two, three four five six", []) == ["one two,", "three four five six"]
    assert cut("one two three four five six", []) == ["one two three four", "five six"]
    assert cut("x" * 45, []) == ["x" * 20, "x" * 20, "x" * 5]


def test_an_utterance_comes_as_soon_as_it_is_certain() -> None:
    utterances = Utterances(shortest=5)
    assert utterances.push("The mill stands.") == [], "a quote may follow"
    assert utterances.push(" S") == ["The mill stands."]
    assert utterances.finish() == ["S"]
