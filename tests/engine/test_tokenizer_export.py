"""The front end gets the tokenizer that transformers would use, and the ids that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import PAGED_TYPES, TEXTS, copy_of, edit_json, load, tiny
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tokenmill.engine import tokenizer_export


@pytest.mark.parametrize("model_type", PAGED_TYPES)
def test_tokenizer_is_the_one_of_transformers(model_type: str) -> None:
    folder = tiny(model_type)
    theirs = AutoTokenizer.from_pretrained(folder)
    info = load(folder).tokenizer
    ours = Tokenizer.from_str(info.tokenizer_json)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids
        assert ours.decode(theirs(text).input_ids, skip_special_tokens=False) == theirs.decode(
            theirs(text).input_ids
        )
    assert info.vocab_size == len(theirs)
    assert (info.bos_token, info.eos_token, info.bos_id) == ("<|bos|>", "<|eos|>", 1)
    assert info.special_tokens["pad_token"] == "<|pad|>"
    assert info.chat_template == theirs.chat_template


def test_a_tokenizer_is_exported_once(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    first = load(folder).tokenizer
    made = tokenizer_export._auto_tokenizer
    calls = []
    monkeypatch.setattr(tokenizer_export, "_auto_tokenizer", lambda *x: calls.append(x) or made(*x))
    assert load(folder).tokenizer == first
    assert not calls
    (folder / "chat_template.jinja").write_text("other")
    assert load(folder).tokenizer.chat_template == "other"
    assert len(calls) == 1


def test_truncation_and_padding_are_not_exported(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_str(load(folder).tokenizer.tokenizer_json)
    assert ours.encode(TEXTS[0]).ids == AutoTokenizer.from_pretrained(tiny("llama"))(TEXTS[0]).input_ids


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": 7}, 9, (7,)),
        ({"eos_token_id": [7, 8]}, 9, (7, 8)),
        ({}, 9, (9,)),
        ({"eos_token_id": 100_000}, 9, ()),
        (None, None, (2,)),
    ],
)
def test_ends_of_a_generation(
    tmp_path: Path, generation: dict[str, Any] | None, config: int | None, ends: tuple[int, ...]
) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    (folder / "generation_config.json").unlink()
    if generation is not None:
        edit_json(folder / "generation_config.json", **generation)
    edit_json(folder / "config.json", eos_token_id=config)
    assert load(folder).eos_ids == tuple(sorted({4, *ends})), "4 ends a turn of the chat template"
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert load(folder).eos_ids == ends


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}{{ m['content'] + '<|tool|>\n' }}{% endfor %}", (2, 5)),
        ("{% for m in messages %}{{ '<|tool|>' + m['content'] }}{% endfor %}", (2,)),
        ("{% for m in messages %}{{ m['content'] + '</turn>' }}{% endfor %}", (2,)),
        (
            "{% for m in messages %}{{ m['content'] + ('<|tool|>' if loop.last else '!') }}{% endfor %}",
            (2, 5),
        ),
        ("{{ raise_exception('a system message must come first') }}", (2,)),
        ("{% broken", (2,)),
    ],
)
def test_the_end_of_a_turn_ends_a_generation(tmp_path: Path, template: str, ends: tuple[int, ...]) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    edit_json(folder / "generation_config.json", eos_token_id=2)
    (folder / "chat_template.jinja").write_text(template)
    assert load(folder).eos_ids == ends


@pytest.mark.parametrize("tools", [None, [], [{"name": "f"}]])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "  ", "x\n  "])
def test_two_templates_become_one(tools: object, ending: str) -> None:
    default, tool_use = (
        "\n\n d{% if x %}\n1\n{% endif %}" + ending,
        "  t{% for i in x %}\n{{ i }}{% endfor %}\n" + ending,
    )
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def render(template: str) -> str:
        return environment.from_string(template).render(tools=tools, x=[3])

    joined = tokenizer_export._one_template({"default": default, "tool_use": tool_use, "rag": "r"})
    assert joined is not None
    assert render(joined) == render(tool_use if tools else default)
    assert tokenizer_export._one_template({"default": default}) == default
    assert tokenizer_export._one_template({"rag": "r"}) is None
    assert tokenizer_export._one_template(None) is None
