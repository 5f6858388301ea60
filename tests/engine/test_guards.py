"""The guards pass what the paged cache gets right, and catch every way of getting it wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PAGED_TYPES

from tokenmill.engine import attention, decoder, fusion, guards
from tokenmill.engine.guards import Verdict, check
from tokenmill.engine.model_class import causal_lm_class
from tokenmill.engine.progress import quiet
from tokenmill.engine.tiny import tiny_config
from tokenmill.kernels import reference

pytestmark = pytest.mark.usefixtures("own_cache")

DECODER_HALVES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gemma3", "gemma4_text", "phi3", "granite",
    "olmo2", "olmo3", "starcoder2", "smollm3", "seed_oss", "phi", "exaone4",
    "mixtral", "olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "gpt_oss", "glm4_moe", "granitemoe",
    "granitemoeshared", "dots1", "exaone_moe", "minimax_m2", "solar_open", "mellum", "hy_v3",
)  # fmt: skip
DECODER_INTERLEAVED = ("glm", "glm4", "cohere", "ernie4_5", "helium", "ernie4_5_moe")
OWN_CODE = (
    "gpt2",
    "opt",
    "deepseek_v3",
    "bert",
    "phimoe",
    "hunyuan_v1_moe",
    "afmoe",
)
DECODER_FORMS = {
    **dict.fromkeys(DECODER_HALVES, "halves"),
    **dict.fromkeys(DECODER_INTERLEAVED, "interleaved"),
    **dict.fromkeys(OWN_CODE, None),
}
"""In which form the fused decoder is right for a type; None: in neither."""


def types_of(model_type: str, **overrides: Any) -> tuple[Any, Any]:
    """A causal LM's class and a config of it."""
    with quiet():
        return causal_lm_class(tiny_config(model_type, 2, 64, 320, overrides))


@pytest.mark.parametrize("model_type", sorted({*PAGED_TYPES, *DECODER_FORMS, "olmoe", "cohere2"}))
def test_passes(model_type: str) -> None:
    verdict = check(*types_of(model_type))
    assert verdict.refusal is None
    assert verdict.fusible
    if model_type in DECODER_FORMS:
        assert verdict.decoder == DECODER_FORMS[model_type]


def test_a_decoder_that_computes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    call = decoder.Decoder.__call__
    monkeypatch.setattr(decoder.Decoder, "__call__", lambda *x: call(*x) * 1.001)
    verdict = check(*types_of("llama"))
    assert verdict == Verdict(None, True, None)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("falcon", "attention of its own"),
        ("mamba", "linear_attention layers"),
        ("llama4_text", "has chunked_attention layers"),
        ("minimax", "has linear_attention layers"),
        ("reformer", "attention of its own"),
        ("doge", "logits differ from eager attention's"),
        ("diffllama", "attends twice in one forward"),
        ("nemotron", "doesn't pass the step's metadata on"),
    ],
)
def test_refuses_by_name_and_reason(model_type: str, words: str) -> None:
    verdict = check(*types_of(model_type))
    assert words in (verdict.refusal or "")
    assert verdict.decoder is None


def test_refuses_what_reads_both_ways() -> None:
    model_class, config = types_of("bert")
    config.is_decoder = False
    assert "logits differ from eager attention's" in (check(model_class, config).refusal or "")


def test_chunked_attention_is_wrong_in_the_cache_and_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "KNOWN_LAYERS", {"full_attention", "chunked_attention"})
    assert "logits differ" in (check(*types_of("llama4_text")).refusal or "")


@pytest.mark.parametrize(
    ("model_type", "option", "value"),
    [
        ("mistral", "window", 0),
        ("gemma2", "softcap", 0.0),
        ("gpt_oss", "sinks", None),
        ("granite", "scale", 0.5),
    ],
)
def test_notices_an_option_that_is_ignored(
    model_type: str, option: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reference.paged_attention
    monkeypatch.setattr(
        reference, "paged_attention", lambda *x, **options: right(*x, **{**options, option: value})
    )
    assert "logits differ" in (check(*types_of(model_type)).refusal or "")


def test_notices_positions_that_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.forward
    monkeypatch.setattr(
        attention,
        "forward",
        lambda module, ids, positions, *rest: right(module, ids, torch.zeros_like(positions), *rest),
    )
    assert "logits differ" in (check(*types_of("llama")).refusal or "")


def test_nan_is_no_small_error() -> None:
    assert not guards.relative_error([torch.tensor([float("nan")])], [torch.ones(1)]) <= guards.TOLERANCE


def test_the_verdict_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []
    judge = guards.judge
    monkeypatch.setattr(guards, "judge", lambda *x: judged.append(x) or judge(*x))
    first = check(*types_of("llama"))
    assert check(*types_of("llama")) == first
    assert check(*types_of("llama", vocab_size=999, hidden_size=128, eos_token_id=3)) == first
    assert len(judged) == 1, "sizes don't matter to the verdict"
    check(*types_of("llama", attention_bias=True))
    assert len(judged) == 2, "what a layer is made of does"
    for _ in range(2):
        assert "logits differ" in (check(*types_of("doge")).refusal or "")
    assert len(judged) == 3, "a refusal is kept too"


def test_a_verdict_that_cannot_be_kept_still_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").touch()
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "plain" / "cache"))
    assert check(*types_of("llama")).refusal is None


def failing(*_: object) -> int:
    raise RuntimeError("no")


def spoiling(module: torch.nn.Module) -> int:
    with torch.no_grad():
        next(module.parameters()).zero_()
    return 1


@pytest.mark.parametrize("broken", [failing, spoiling])
def test_a_model_that_fusion_breaks_runs_unfused(
    broken: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "fuse_siblings", broken)
    verdict = check(*types_of("llama"))
    assert verdict.refusal is None
    assert not verdict.fusible


def test_a_small_models_twin_has_a_layer_of_each_kind() -> None:
    """Three layers, of which no two are alike: windows and mixtures come and go by themselves."""
    config = types_of("exaone_moe")[1]
    twin = guards.twin_fields(config)
    for name in ("layer_types", "mlp_layer_types"):
        assert twin[name] == getattr(config, name)


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "gpt_oss", "deepseek_v3", "smollm3", "exaone4", "exaone_moe"]
)
def test_the_twin_has_a_layer_of_each_kind(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = CONFIG_MAPPING[model_type]().to_dict()
    twin = guards.twin_fields(CONFIG_MAPPING[model_type]())
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        assert set(map(str, twin.get(name) or ())) == set(map(str, fields.get(name) or ()))
    assert twin["num_hidden_layers"] >= 2
    assert twin["hidden_size"] == guards.HIDDEN
    assert twin.get("sliding_window") in (None, 8)
