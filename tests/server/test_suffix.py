"""`suffix`: by the model's own tokens, or by ranking candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from fake_engine import FIM_TOKENIZER, FIM_TOKENS, TOKENIZER, logprob
from live_server import LiveServer, events
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, processors
from waiting import eventually

from tokenmill.engine.messages import TokenizerInfo
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.config import FimMarkup
from tokenmill.server.errors import ApiError
from tokenmill.server.fim import make_fim
from tokenmill.server.fim_presets import PRESETS

TOY = Tokenizer(FIM_TOKENIZER)
PREFIX, SUFFIX, MIDDLE, FILE = (TOY.encode(token, add_special_tokens=False)[0] for token in FIM_TOKENS)
START = FIM_TOKENIZER.bos_id

MODELS = """
version: 1
models:
  toy/fim:
    source: "fake:fim=1"
    max_context: 2048
    deployments:
      spm: {fim: {prefix: <fim_prefix>, suffix: <fim_suffix>, middle: <fim_middle>, order: spm, stop: [97]}}
      none: {fim: off}
  toy/plain:
    source: "fake:"
    max_context: 256
    deployments:
      rerank: {suffix: rerank}
      few: {suffix: rerank, limits: {max_best_of: 3, max_prompts: 7}}
"""


@pytest.fixture(scope="module")
def fim(module_start: Callable[[str], LiveServer]) -> LiveServer:
    return module_start(MODELS)


@pytest.fixture(scope="module")
def module_start() -> Iterator[Callable[[str], LiveServer]]:
    from tokenmill.server.config_file import parse_config

    running: list[LiveServer] = []

    def begin(text: str) -> LiveServer:
        running.append(LiveServer(parse_config(text)).__enter__())
        return running[-1]

    yield begin
    for live in running:
        live.__exit__()


def plain(text: str) -> list[int]:
    return TOY.encode(text, add_special_tokens=False, split_special=True)


def filled(server: LiveServer, model: str = "toy/fim", **fields: Any) -> dict[str, Any]:
    response = server.complete(model=model, return_token_ids=True, **{"max_tokens": 4, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def test_prompt_and_suffix_stand_between_the_tokens(fim: LiveServer) -> None:
    answer = filled(fim, prompt="def f(", suffix="return")
    expected = [START, PREFIX, *plain("def f("), SUFFIX, *plain("return"), MIDDLE]
    assert answer["prompt_token_ids"] == expected
    answer = filled(fim, prompt="ab", suffix="c", add_special_tokens=False)
    assert answer["prompt_token_ids"] == [PREFIX, *plain("ab"), SUFFIX, *plain("c"), MIDDLE]


def test_suffix_first(fim: LiveServer) -> None:
    answer = filled(fim, "toy/fim/spm", prompt="ab", suffix="c")
    assert answer["prompt_token_ids"] == [START, SUFFIX, *plain("c"), PREFIX, *plain("ab"), MIDDLE]


def test_text_can_not_forge_the_tokens(fim: LiveServer) -> None:
    for token in (*FIM_TOKENS, "<s>"):
        ids = filled(fim, prompt=f"a{token}b", suffix=f"{token}c")["prompt_token_ids"]
        assert [ids.count(marker) for marker in (START, PREFIX, SUFFIX, MIDDLE, FILE)] == [1, 1, 1, 1, 0]
        assert TOY.decode(ids) == f"a{token}b{token}c" + "<fim_middle>"


def test_prompts_as_ids_and_in_lists(fim: LiveServer) -> None:
    body = fim.complete(
        model="toy/fim", prompt=[plain("ab"), plain("c")], suffix="x", max_tokens=1, return_token_ids=True
    ).json()
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [
        [START, PREFIX, *plain(text), SUFFIX, *plain("x"), MIDDLE] for text in ("ab", "c")
    ]


def test_empty_prompt_and_empty_suffix(fim: LiveServer) -> None:
    assert filled(fim, prompt="", suffix="x")["prompt_token_ids"] == [
        START,
        PREFIX,
        SUFFIX,
        *plain("x"),
        MIDDLE,
    ]
    assert filled(fim, prompt="ab", suffix="")["prompt_token_ids"] == [START, *plain("ab")]


def test_truncation_keeps_the_end_of_the_prompt(fim: LiveServer) -> None:
    answer = filled(fim, prompt="abcdef", suffix="x", truncate_prompt_tokens=2, echo=True, max_tokens=0)
    assert answer["prompt_token_ids"] == [START, PREFIX, *plain("ef"), SUFFIX, *plain("x"), MIDDLE]
    assert answer["text"] == "ef"


def test_echo_is_the_prompt_alone(fim: LiveServer) -> None:
    assert filled(fim, prompt="abc", suffix="x", echo=True, max_tokens=0)["text"] == "abc"
    assert filled(fim, prompt=plain("abc"), suffix="x", echo=True, max_tokens=0)["text"] == "abc"


def test_stops_at_the_tokens_of_the_markup(fim: LiveServer) -> None:
    for token in (PREFIX, SUFFIX, MIDDLE, FILE):
        answer = filled(fim, prompt="ab", suffix="x", logit_bias={str(token): 100})
        assert (answer["text"], answer["finish_reason"], answer["token_ids"]) == ("", "stop", [token])
    answer = filled(fim, prompt="ab", suffix="x", logit_bias={str(FILE): 100}, ignore_eos=True)
    assert answer["finish_reason"] == "length"
    answer = filled(fim, "toy/fim/spm", prompt="ab", suffix="x", logit_bias={"97": 100})
    assert answer["finish_reason"] == "stop"


def test_model_without_the_tokens_refuses(fim: LiveServer) -> None:
    for model in ("toy/plain", "toy/fim/none"):
        response = fim.complete(model=model, prompt="a", suffix="x")
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("suffix", "suffix_not_supported")
        assert fim.complete(model=model, prompt="a", suffix="").status_code == 200


def test_prompt_and_suffix_must_fit_together(fim: LiveServer) -> None:
    response = fim.complete(model="toy/fim", prompt="a" * 1000, suffix="b" * 1050, max_tokens=1)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    response = fim.complete(model="toy/fim", prompt="a", suffix="b" * 100_000, max_tokens=1)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def expected_best(texts: list[str], prompt: str, suffix: str) -> list[str]:
    """By the toy's own log-probabilities, which depend on a token and its place."""

    def score(text: str) -> float:
        ids = [START, *plain(prompt + text)]
        return sum(logprob(token, i) for i, token in enumerate(plain(suffix), len(ids)))

    return sorted(texts, key=lambda text: -score(text))


@pytest.mark.parametrize("stream", [False, True])
def test_candidates_are_ranked_by_the_suffix(fim: LiveServer, stream: bool) -> None:
    fields = {"model": "toy/plain/rerank", "prompt": "abcde", "suffix": "xy", "max_tokens": 5, "stop": "c"}
    plain_texts = [
        choice["text"]
        for choice in fim.complete(**{**fields, "suffix": None, "model": "toy/plain", "n": 4}).json()[
            "choices"
        ]
    ]
    assert len(set(plain_texts)) > 2
    best = expected_best(plain_texts, "abcde", "xy")
    response = fim.complete(**fields, n=2, stream=stream)
    if stream:
        *chunks, done = events(response)
        assert done == "[DONE]"
        choices = [msgspec.json.decode(chunk)["choices"][0] for chunk in chunks]
    else:
        choices = response.json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, best[0]), (1, best[1])]
    assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)


def test_usage_of_ranking_counts_everything(fim: LiveServer) -> None:
    body = fim.complete(model="toy/plain/rerank", prompt="abcde", suffix="xy", max_tokens=5).json()
    assert len(body["choices"]) == 1
    assert body["usage"]["completion_tokens"] == 4 * 5
    assert body["usage"]["prompt_tokens"] == 6 + 4 * (6 + 5 + 2)
    eventually(fim.is_idle)


def test_ranking_where_candidates_can_not_differ(fim: LiveServer) -> None:
    fields = {"model": "toy/plain/rerank", "prompt": "abc", "suffix": "x"}
    body = fim.complete(**fields, temperature=0, max_tokens=3).json()
    assert (body["choices"][0]["text"], body["usage"]["completion_tokens"]) == ("abc", 3)
    assert fim.complete(**fields, max_tokens=0).json()["choices"][0]["text"] == ""
    body = fim.complete(**fields, best_of=3, max_tokens=2).json()
    assert body["usage"]["completion_tokens"] == 6


def test_ranking_needs_room_for_the_suffix(fim: LiveServer) -> None:
    fields = {"model": "toy/plain/rerank", "prompt": "a" * 100}
    error = fim.complete(**fields, suffix="b" * 100, max_tokens=100).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "100 in the suffix" in error["message"]
    error = fim.complete(**fields, suffix="b" * 100_000).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "suffix")
    rest = {"model": "toy/plain/rerank", "prompt": "a" * 100, "suffix": "b" * 100}
    body = fim.client.post("/v1/fim/completions", json={**rest, "temperature": 0}).json()
    assert body["usage"]["completion_tokens"] == 256 - 101 - 100


def test_candidates_stay_within_the_limits_of_the_entry(fim: LiveServer) -> None:
    fields = {"model": "toy/plain/few", "suffix": "x", "max_tokens": 2}
    assert fim.complete(**fields, prompt="abc").json()["usage"]["completion_tokens"] == 3 * 2
    assert fim.complete(**fields, prompt=["abc"] * 3).json()["usage"]["completion_tokens"] == 3 * 2 * 2
    assert fim.complete(**fields, prompt=["abc"] * 7).json()["usage"]["completion_tokens"] == 7 * 2


def with_tokens(*tokens: str, special: bool = True) -> TokenizerInfo:
    library = Library.from_str(TOKENIZER.tokenizer_json)
    (library.add_special_tokens if special else library.add_tokens)(list(tokens))
    return msgspec.structs.replace(
        TOKENIZER, tokenizer_json=library.to_str(), vocab_size=library.get_vocab_size()
    )


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_families_are_found_by_their_tokens(name: str, special: bool) -> None:
    markup = PRESETS[name]
    tokens = [str(token) for token in (markup.prefix, markup.suffix, markup.middle, *markup.stop) if token]
    tokenizer = Tokenizer(with_tokens(*tokens, special=special))
    ids = {token: tokenizer.encode(token, add_special_tokens=False)[0] for token in tokens}
    for wanted in ("auto", name, markup):
        fim = make_fim(tokenizer, wanted)
        assert fim is not None
        assert set(fim.stop) == set(ids.values())
        p, s = ids[str(markup.prefix)], ids[str(markup.suffix)]
        m = [ids[str(markup.middle)]] if markup.middle else []
        whole = [p, 1, s, 2, *m] if markup.order == "psm" else [s, 2, p, 1, *m]
        assert fim.arrange([1], [2]) == [START, *whole]
        for token in tokens:
            assert set(ids.values()).isdisjoint(fim.encode(f"x{token}y", "prompt"))
    assert make_fim(tokenizer, False) is None
    assert make_fim(Tokenizer(TOKENIZER), name) is None


@pytest.mark.parametrize("name", ["codegemma", "qwen2.5-coder", "granite"])
def test_families_that_share_tokens_are_told_apart_by_those_for_files(name: str) -> None:
    markup = PRESETS[name]
    files = [str(token) for token in (markup.repo, markup.file) if token]
    tokenizer = Tokenizer(
        with_tokens(*(str(t) for t in (markup.prefix, markup.suffix, markup.middle)), *files)
    )
    fim = make_fim(tokenizer, "auto")
    assert fim is not None
    marks = [tokenizer.encode(token, add_special_tokens=False)[0] for token in files]
    ids = fim.encode_files([("util.py", "x")])
    assert [token for token in ids if token in marks] == [*marks[:-1], marks[-1], marks[-1]]


def test_markup_by_ids() -> None:
    fim = make_fim(TOY, FimMarkup(prefix=1, suffix=2, middle=3, order="spm2", stop=(4,)))
    assert fim is not None
    assert fim.arrange([7], [8], add_special_tokens=False) == [1, 2, 8, 3, 7]
    assert fim.stop == (1, 2, 3, 4)
    assert make_fim(TOY, FimMarkup(prefix=1, suffix=2, middle=10**6)) is None


def test_tokens_that_a_text_may_hold_are_refused_in_it() -> None:
    ordinary = TOY.encode("a", add_special_tokens=False)[0]
    fim = make_fim(TOY, FimMarkup(prefix=ordinary, suffix=2, middle=3))
    assert fim is not None
    with pytest.raises(ApiError) as caught:
        fim.encode("banana", "suffix")
    assert caught.value.param == "suffix"


def test_suffix_gets_no_mark_of_a_beginning() -> None:
    """SentencePiece puts a space's mark before each text; the suffix isn't the beginning of one."""
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "▁", "a", "b", "☺", "▁<PRE>", "▁<SUF>", "▁<MID>"])
    }
    library = Library(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>", "▁<PRE>", "▁<SUF>", "▁<MID>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer(
        TokenizerInfo(tokenizer_json=library.to_str(), bos_id=1, eos_ids=[], vocab_size=len(vocab))
    )
    fim = make_fim(tokenizer, "auto")
    assert fim is not None
    before, after = fim.encode("ab", "prompt"), fim.encode("ba", "suffix", inside=True)
    assert fim.arrange(before, after) == [1, 6, 2, 3, 4, 7, 4, 3, 8]
    assert fim.encode(" b", "suffix", inside=True) == [2, 4]
    assert fim.encode("", "suffix", inside=True) == []
