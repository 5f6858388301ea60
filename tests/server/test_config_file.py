"""models.yaml: what it may say, and the line, column and hint for what it may not (fault table, row 38)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmill.engine.config import KVCacheConfig, SpeechConfig
from tokenmill.server.config import TOOL_PARSERS, FimMarkup, engine_config
from tokenmill.server.config_file import ConfigError, load_config, parse_config
from tokenmill.server.fim_presets import PRESETS
from tokenmill.server.plan import make_plan

FULL = """
version: 1
server:
  {host: 0.0.0.0, port: 9000, api_keys_env: KEYS, admin_keys_env: BOSS, max_body_mb: 1, max_queue: 5, cache_salt: key}
defaults: {dtype: float16, device: cpu, timeout_s: 60, idle_unload_s: 5}
models:
  a/b:
    source: some/where
    revision: main
    dtype: bfloat16
    tensor_parallel: 2
    quantization: null
    max_context: 128
    kv_cache: {memory_share: 0.5, gib: 1, dtype: auto, prefix_cache: false}
    max_batch: 4
    max_batch_tokens: 64
    threads: 3
    compile: off
    deterministic: true
    chat_template: null
    tools: true
    tool_parser: hermes
    fim: {prefix: <a>, suffix: 5, middle: <c>, order: spm2, stop: [<d>, 7], repo: <r>, file: <f>}
    suffix: rerank
    speculation: {prediction: false, ngram: true}
    speech: null
    aliases: [c, "d:e"]
    load: lazy
    limits: {max_stop: 2, max_logprobs: 5, max_n: 3, max_best_of: 4, max_prompts: 5}
    sampling: {temperature: 0.5, stop: x, logit_bias: {5: -100}}
    force: {top_k: 3}
    deployments:
      cold: {sampling: {temperature: 0}, force: {seed: 1}, timeout_s: 5, aliases: [cold]}
      small: {quantization: int8, limits: {max_n: 1}}
      other:
        fim: off
        suffix: tokens
        tools: off
        tool_parser: json
        speculation: {prediction: true}
  x/y: {source: ./folder}
"""


def test_everything_that_may_be_said() -> None:
    config = parse_config(FULL)
    plan = make_plan(config)
    assert list(plan.variants) == ["a/b", "a/b/cold", "a/b/small", "a/b/other", "x/y"]
    assert plan.aliases == {"c": "a/b", "d:e": "a/b", "cold": "a/b/cold"}
    assert list(plan.engines) == ["a/b", "a/b/small", "x/y"]
    cold = plan.variants["a/b/cold"]
    assert (cold.engine, cold.root, cold.timeout_s) == ("a/b", "a/b", 5)
    assert (cold.sampling["temperature"], cold.sampling["stop"]) == (0, "x")
    assert cold.force == {"top_k": 3, "seed": 1}
    limits = plan.variants["a/b/small"].limits
    assert (limits.max_n, limits.max_stop, limits.max_prompts) == (1, 2, 5)
    assert plan.variants["a/b/cold"].limits == plan.variants["a/b"].limits
    assert plan.engines["a/b/small"].quantization == "int8"
    engine = plan.engines["a/b"]
    assert (engine.dtype, engine.device, engine.deterministic, engine.compile) == (
        "bfloat16",
        "cpu",
        True,
        False,
    )
    assert engine.kv_cache == KVCacheConfig(memory_share=0.5, gib=1, prefix_cache=False)
    assert engine.speculation_ngram
    assert (engine.threads, plan.engines["x/y"].threads) == (3, None)
    assert plan.engines["x/y"].dtype == "float16"
    assert plan.variants["x/y"].timeout_s == 60


def test_how_a_model_is_asked_may_differ_by_deployment() -> None:
    variants = make_plan(parse_config(FULL)).variants

    def told(name: str) -> tuple[object, ...]:
        variant = variants[name]
        return (variant.fim, variant.suffix, variant.tools, variant.tool_parser, variant.predicts)

    markup = FimMarkup(
        prefix="<a>", suffix=5, middle="<c>", order="spm2", stop=("<d>", 7), repo="<r>", file="<f>"
    )
    assert told("a/b") == told("a/b/cold") == (markup, "rerank", True, "hermes", False)
    assert told("a/b/other") == (False, "tokens", False, "json", True)
    assert told("x/y") == ("auto", "tokens", True, "auto", True)
    assert variants["a/b/other"].engine == "a/b"


def test_chat_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}é", encoding="utf-8")
    (tmp_path / "other.jinja").write_text("other")
    own, other = tmp_path / "own.jinja", tmp_path / "other.jinja"
    deployments = f"{{c: {{chat_template: {other}}}, d: {{}}}}"
    text = f"models: {{a/b: {{source: x, chat_template: {own}, deployments: {deployments}}}}}"
    variants = make_plan(parse_config(text)).variants
    assert [variants[name].chat_template for name in ("a/b", "a/b/c", "a/b/d")] == [
        "{{ messages }}é",
        "other",
        "{{ messages }}é",
    ]
    own.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="chat_template can't be read"):
        parse_config(text)


@pytest.mark.parametrize("name", ["auto", *PRESETS])
def test_every_preset_may_be_named(name: str) -> None:
    config = parse_config(f"models: {{a/b: {{source: x, fim: {name}}}}}")
    assert make_plan(config).variants["a/b"].fim == name


@pytest.mark.parametrize("name", ["auto", *TOOL_PARSERS])
def test_every_tool_parser_may_be_named(name: str) -> None:
    config = parse_config(f"models: {{a/b: {{source: x, tool_parser: {name}}}}}")
    assert make_plan(config).variants["a/b"].tool_parser == name


def test_speech_is_a_source_or_a_map() -> None:
    config = parse_config(
        "defaults: {device: cpu}\nmodels:\n  a/b: {source: x, speech: y/z, quantization: int8, deployments: {q: "
        "{quantization: int4}}}\n  c/d: {source: x, device: 'cuda:0', speech: {source: ./y, revision: r, "
        "threads: 1, voices: {alloy: 3, ann: Ann}}}\n  e/f: {source: x}\n"
    )
    plan = make_plan(config)
    assert plan.voices == {
        "a/b": SpeechConfig(source="y/z", device="cpu"),
        "c/d": SpeechConfig(
            source="./y", revision="r", device="cuda:0", threads=1, voices={"alloy": "3", "ann": "Ann"}
        ),
    }
    assert {name: plan.variants[name].root for name in plan.engines} == {
        "a/b": "a/b",
        "a/b/q": "a/b",
        "c/d": "c/d",
        "e/f": "e/f",
    }


def test_a_deployment_of_the_same_quantization_shares_the_engine() -> None:
    config = parse_config(
        "models: {a/b: {source: x, quantization: int8, deployments: {c: {quantization: int8}}}}"
    )
    assert list(make_plan(config).engines) == ["a/b"]
    entry = config.models["a/b"]
    assert engine_config(entry, config.defaults).quantization == "int8"


def test_the_engine_is_told_how_many_ranks_there_are() -> None:
    config = parse_config("models: {a/b: {source: x, tensor_parallel: 4}, c/d: {source: x}}")
    ranks = [engine_config(entry, config.defaults).tensor_parallel for entry in config.models.values()]
    assert ranks == [4, 1]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "1:1", "empty"),
        ("models:\n\ta/b: 3", "2:1", "'\\t'"),
        ("models: [a]\n", "1:9", "must be a map of keys and values, not a list"),
        ("models: x\n", "1:9", "not a single value"),
        ("- a\n", "1:1", "must be a map"),
        ("model: {}\n", "1:1", "did you mean 'models'?"),
        ("version: 1\n", "1:1", "needs the key 'models'"),
        ("version: 2\nmodels: {a/b: {source: x}}\n", "1:10", "version"),
        ("models: {}\n", "1:9", "at least one"),
        ("models:\n  a/b: {}\n", "2:8", "needs the key 'source'"),
        ("models:\n  a/b: {sourc: x}\n", "2:9", "did you mean 'source'?"),
        ("models:\n  a/b: {source: x, source: y}\n", "2:20", "given twice"),
        ("models:\n  a/b: {source: x, [1]: y}\n", "2:20", "plain string"),
        ("models:\n  a/b: {source: ''}\n", "2:17", "source"),
        ("models:\n  a/b: {source: x, dtype: int3}\n", "2:27", "dtype"),
        ("models:\n  a/b: {source: x, max_batch: 0}\n", "2:31", ">= 1"),
        ("models:\n  a/b: {source: x, max_batch: 2.5}\n", "2:31", "int"),
        ("models:\n  a/b: {source: x, max_batch: yes}\n", "2:31", "int"),
        (
            "models:\n  a/b:\n    source: x\n    kv_cache: {memory_shar: 1}\n",
            "4:16",
            "did you mean 'memory_share'?",
        ),
        ("models:\n  a/b:\n    source: x\n    kv_cache: {memory_share: 2}\n", "4:15", "memory_share"),
        ("models:\n  a/b:\n    source: x\n    kv_cache: {gib: -1}\n", "4:15", "gib"),
        ("models:\n  a/b: {source: x, limits: {max_n: 500}}\n", "2:36", "<= 128"),
        ("models:\n  a/b: {source: x, limits: 5}\n", "2:28", "must be a map"),
        ("models:\n  a/b: {source: x, sampling: {temprature: 1}}\n", "2:30", "did you mean 'temperature'?"),
        (
            "models:\n  a/b: {source: x, sampling: {temperature: 3}}\n",
            "2:30",
            "temperature must be from 0.0 to 2.0",
        ),
        ("models:\n  a/b: {source: x, force: {top_p: 0}}\n", "2:27", "top_p"),
        ("models:\n  a/b: {source: x, force: {n: 2}}\n", "2:27", "'n'"),
        ("models:\n  a/b: {source: x, aliases: [a/b]}\n", "2:29", "taken already"),
        (
            "models:\n  a/b: {source: x, aliases: [c]}\n  d/e: {source: y, aliases: [c]}\n",
            "3:29",
            "taken already",
        ),
        ("models:\n  a/b: {source: x, aliases: [a/b/c], deployments: {c: {}}}\n", "2:55", "taken already"),
        ("models:\n  a/b: {source: x, aliases: ['two words']}\n", "2:29", "can't be a model's name"),
        ("models:\n  ab: {source: x}\n", "2:7", "vendor/model_name"),
        ("models:\n  a/b: {source: x, deployments: {'c/d': {}}}\n", "2:41", "deployment's name"),
        ("models:\n  a/b: {source: x, deployments: {c: {dtype: auto}}}\n", "2:38", "no key 'dtype'"),
        ("models:\n  a/b: {source: x, tensor_parallel: 0}\n", "2:37", "tensor_parallel"),
        ("models:\n  a/b: {source: x, tensor_parallel: 65}\n", "2:37", "tensor_parallel"),
        ("models:\n  a/b: {source: x, device: 'cuda:1', tensor_parallel: 2}\n", "2:55", "device is cuda"),
        (
            "defaults: {device: 'cuda:0'}\nmodels:\n  a/b: {source: x, tensor_parallel: 2}\n",
            "3:37",
            "device is cuda",
        ),
        ("models:\n  a/b: {source: x, quantization: gguf, tensor_parallel: 2}\n", "2:57", "gguf"),
        ("models:\n  a/b: {source: x, deterministic: true, tensor_parallel: 4}\n", "2:58", "deterministic"),
        ("models:\n  a/b: {source: x, speech: ''}\n", "2:28", "speech"),
        ("models:\n  a/b: {source: x, speech: {voices: {a: 1}}}\n", "2:28", "needs the key 'source'"),
        ("models:\n  a/b: {source: x, speech: {source: y, voice: a}}\n", "2:40", "did you mean 'voices'?"),
        ("models:\n  a/b: {source: x, speech: {source: y, voices: {a: []}}}\n", "2:48", "voices"),
        ("models:\n  a/b: {source: x, fim: {prefix: a}}\n", "2:25", "needs the key 'suffix'"),
        (
            "models:\n  a/b: {source: x, fim: {prefix: a, suffix: b, midle: c}}\n",
            "2:48",
            "did you mean 'middle'?",
        ),
        ("models:\n  a/b: {source: x, fim: {prefix: a, suffix: b}}\n", "2:25", "needs a middle token"),
        ("models:\n  a/b: {source: x, fim: {prefix: a, suffix: b, order: mps}}\n", "2:55", "order"),
        ("models:\n  a/b: {source: x, fim: {prefix: '', suffix: b}}\n", "2:34", "prefix"),
        ("models:\n  a/b: {source: x, fim: starcodr}\n", "2:25", "starcoder"),
        ("models:\n  a/b: {source: x, fim: on}\n", "2:25", "say auto"),
        ("models:\n  a/b: {source: x, fim: 5}\n", "2:25", "fim"),
        ("models:\n  a/b: {source: x, suffix: both}\n", "2:28", "suffix"),
        ("models:\n  a/b: {source: x, tools: maybe}\n", "2:27", "tools"),
        ("models:\n  a/b: {source: x, tool_parser: hermse}\n", "2:33", "hermes"),
        (
            "models:\n  a/b: {source: x, chat_template: /no/such/file}\n",
            "2:35",
            "chat_template can't be read",
        ),
        ("models:\n  a/b: {source: x, deployments: {c: {fim: starcodr}}}\n", "2:43", "starcoder"),
        (
            "models:\n  a/b: {source: x, deployments: {c: {speculation: {ngram: true}}}}\n",
            "2:52",
            "no key 'ngram'",
        ),
        ("models:\n  a/b: {source: x, deployments: {c: {limits: {max_stop: 99}}}}\n", "2:57", "<= 64"),
        ("server: {port: 70000}\nmodels: {a/b: {source: x}}\n", "1:16", "port"),
        ("server: {max_queue: -1}\nmodels: {a/b: {source: x}}\n", "1:21", "max_queue"),
        ("models: &a\n  a/b: *a\n", "1:9", "contains itself"),
        ("models: {a/b: {source: !!python/object:os.system x}}\n", "1:24", "can't be read"),
        ("models: {a/b: {source: x\n", "2:1", "expected"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(text: str, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "m.yaml")
    message = str(caught.value)
    assert message.startswith(f"m.yaml:{where}: "), message
    assert what in message
    assert "\n" not in message


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_config("[" * 100_000)


def test_file_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "binary.yaml")
