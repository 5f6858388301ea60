"""The detokenizer's invariant, against a brute-force reading of its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from tokenmill.engine.detokenizer import Detokenizer, StopMatcher
from tokenmill.engine.messages import TokenizerInfo
from tokenmill.engine.tokenizer import Tokenizer


def make_tokenizer() -> Tokenizer:
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ["ab", "ba", "aab", "bb", "Ġa", "âĤ", "¬a", "abab"]:
        vocab[token] = len(vocab)
    library = Library(models.BPE(vocab=vocab, merges=[]))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<eos>"])
    return Tokenizer(TokenizerInfo(tokenizer_json=library.to_str(), vocab_size=len(vocab) + 1))


TOKENIZER = make_tokenizer()
LIBRARY = Library.from_str(TOKENIZER.info.tokenizer_json)
EOS = LIBRARY.token_to_id("<eos>")
NAMES = ["a", "b", "ab", "ba", "aab", "bb", "Ġa", "âĤ", "¬a", "abab", "â", "Ĥ", "¬", "<eos>"]
TOKENS = st.sampled_from([LIBRARY.token_to_id(name) for name in NAMES])
STOPS = st.lists(st.text("ab €", min_size=1, max_size=5), max_size=4).map(tuple)


def ids_of(*names: str) -> list[int]:
    return [LIBRARY.token_to_id(name) for name in names]


def brute_force(
    ids: list[int], stop: tuple[str, ...], include: bool, min_tokens: int
) -> tuple[str, int, bool]:
    """(text, tokens, stopped): read the characters token by token and look for a completed stop each time."""
    text = ""
    for count in range(1, len(ids) + 2):
        whole = TOKENIZER.decode(ids[:count])
        if count <= len(ids):
            # An unfinished character shows as trailing U+FFFD now and as something else later.
            pending = len(whole) - len(whole.rstrip("�"))
            alive = (
                TOKENIZER.decode([*ids[:count], *ids_of("¬")]),
                TOKENIZER.decode([*ids[:count], *ids_of("Ĥ", "¬")]),
            )
            if pending and any(later[: len(whole)] != whole for later in alive):
                whole = whole[:-1]
        count = min(count, len(ids))
        while len(text) < len(whole):
            text += whole[len(text)]
            ended = [stop_string for stop_string in stop if text.endswith(stop_string)]
            if ended and count >= min_tokens:
                return (text if include else text[: -max(map(len, ended))]), count, True
    return text, len(ids), False


@given(
    ids=st.lists(TOKENS, max_size=25),
    stop=STOPS,
    include=st.booleans(),
    min_tokens=st.integers(0, 10),
    data=st.data(),
)
def test_pieces_equal_the_whole_text_cut_at_the_first_stop(
    ids: list[int], stop: tuple[str, ...], include: bool, min_tokens: int, data: st.DataObject
) -> None:
    expected, count, stopped = brute_force(ids, stop, include, min_tokens)
    detokenizer = Detokenizer(TOKENIZER, stop, include, min_tokens=min_tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    released = ""
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        settled = detokenizer.settled
        released += detokenizer.push(ids[start:end])
        assert expected.startswith(released)
        assert detokenizer.settled >= settled
    released += detokenizer.push([], finished=True)
    assert released == detokenizer.text == expected
    assert (detokenizer.token_count, detokenizer.stopped) == (count, stopped)
    kept = (
        [offset for offset in detokenizer.offsets if offset < len(expected)]
        if stopped
        else detokenizer.offsets
    )
    assert detokenizer.settled == len(kept)


@given(
    text=st.text("ab", max_size=60),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_matcher_holds_exactly_what_may_be_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    for i, character in enumerate(text, 1):
        if matcher.feed(character) is not None:
            assert any(text[:i].endswith(stop) for stop in stops)
            break
        assert not any(text[:i].endswith(stop) for stop in stops)
        prefixes = [stop[:n] for stop in stops for n in range(1, len(stop))]
        assert matcher.partial == max((len(p) for p in prefixes if text[:i].endswith(p)), default=0)


def test_nothing_of_a_stop_is_released_across_token_borders() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["baa"])
    assert detokenizer.push(ids_of("a", "b")) == "a"
    assert detokenizer.push(ids_of("a")) == ""
    assert detokenizer.push(ids_of("b")) == "ba", "what turned out to be text comes at once, the new b waits"
    assert detokenizer.push(ids_of("aab")) == ""
    assert detokenizer.stopped
    assert detokenizer.text == "aba"
    assert detokenizer.push(ids_of("a"), finished=True) == ""


def test_offsets_and_settled_tokens_around_a_stop() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["bb"])
    detokenizer.push(ids_of("a", "ab", "ba", "a"))
    assert detokenizer.offsets == [0, 1, 3]
    assert detokenizer.text == "aa"
    assert detokenizer.token_count == 3
    assert detokenizer.settled == 2, "the third token starts inside the stop"


def test_the_longest_of_stops_completed_together_is_cut() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["b", "aab"])
    assert detokenizer.push(ids_of("b"), finished=True) == ""
    detokenizer = Detokenizer(TOKENIZER, ["ab", "aab"])
    assert detokenizer.push(ids_of("a", "aab")) == "a"


def test_stop_is_included_when_asked_for() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["bb"], include_stop=True)
    assert detokenizer.push(ids_of("ab")) == "ab", "nothing needs to wait"
    assert detokenizer.push(ids_of("ba", "a")) == "b"
    assert detokenizer.text == "abb"


def test_min_tokens_passes_over_early_stops() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["ab"], min_tokens=3)
    detokenizer.push(ids_of("ab", "a", "b"))
    assert detokenizer.stopped
    assert detokenizer.text == "ab"


def test_partial_characters_wait_and_flush() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.push(ids_of("âĤ")) == ""
    assert detokenizer.push(ids_of("¬a")) == "€a"
    assert detokenizer.push(ids_of("â")) == ""
    assert detokenizer.push([], finished=True) == "�"
    assert detokenizer.offsets == [0, 0, 2]


def test_the_ending_token_has_no_text_but_counts() -> None:
    for skip in (True, False):
        detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=skip)
        assert detokenizer.push(ids_of("a", "<eos>"), finished=True, stop_token=EOS) == "a"
        assert (detokenizer.token_count, detokenizer.settled, detokenizer.offsets) == (2, 2, [0, 1])
    included = Detokenizer(TOKENIZER, include_stop=True, skip_special_tokens=False)
    assert included.push(ids_of("a", "<eos>"), finished=True, stop_token=EOS) == "a<eos>"


def test_prompt_with_an_unfinished_character() -> None:
    detokenizer = Detokenizer(TOKENIZER, prompt_ids=ids_of("a", "âĤ"))
    assert detokenizer.push(ids_of("¬a")) == "€a"
