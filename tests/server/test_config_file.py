"""models.yaml: what it may say, and the line, column and hint for what it may not (fault table, row 38)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmill.engine.config import KVCacheConfig
from tokenmill.server.config import engine_config
from tokenmill.server.config_file import ConfigError, load_config, parse_config
from tokenmill.server.plan import make_plan

FULL = """
version: 1
server: {host: 0.0.0.0, port: 9000, api_keys_env: KEYS, max_body_mb: 1, max_queue: 5, cache_salt: key}
defaults: {dtype: float16, device: cpu, timeout_s: 60, idle_unload_s: 5}
models:
  a/b:
    source: some/where
    revision: main
    dtype: bfloat16
    tensor_parallel: 1
    quantization: null
    max_context: 128
    kv_cache: {memory_share: 0.5, gib: 1, dtype: auto, prefix_cache: false}
    max_batch: 4
    max_batch_tokens: 64
    compile: off
    deterministic: true
    chat_template: null
    tool_parser: auto
    fim: auto
    suffix: tokens
    speculation: {prediction: true, ngram: false}
    speech: null
    aliases: [c, "d:e"]
    load: lazy
    limits: {max_stop: 2, max_logprobs: 5, max_n: 3, max_best_of: 4, max_prompts: 5}
    sampling: {temperature: 0.5, stop: x, logit_bias: {5: -100}}
    force: {top_k: 3}
    deployments:
      cold: {sampling: {temperature: 0}, force: {seed: 1}, timeout_s: 5, aliases: [cold]}
      small: {quantization: int8, limits: {max_n: 1}}
  x/y: {source: ./folder}
"""


def test_everything_that_may_be_said() -> None:
    config = parse_config(FULL)
    plan = make_plan(config)
    assert list(plan.variants) == ["a/b", "a/b/cold", "a/b/small", "x/y"]
    assert plan.aliases == {"c": "a/b", "d:e": "a/b", "cold": "a/b/cold"}
    assert list(plan.engines) == ["a/b", "a/b/small", "x/y"]
    cold = plan.variants["a/b/cold"]
    assert (cold.engine, cold.root, cold.timeout_s) == ("a/b", "a/b", 5)
    assert (cold.sampling["temperature"], cold.sampling["stop"]) == (0, "x")
    assert cold.force == {"top_k": 3, "seed": 1}
    assert plan.variants["a/b/small"].limits.max_n == 1
    assert plan.engines["a/b/small"].quantization == "int8"
    engine = plan.engines["a/b"]
    assert (engine.dtype, engine.device, engine.deterministic, engine.compile) == (
        "bfloat16",
        "cpu",
        True,
        False,
    )
    assert engine.kv_cache == KVCacheConfig(memory_share=0.5, gib=1, prefix_cache=False)
    assert plan.engines["x/y"].dtype == "float16"
    assert plan.variants["x/y"].timeout_s == 60


def test_a_deployment_of_the_same_quantization_shares_the_engine() -> None:
    config = parse_config(
        "models: {a/b: {source: x, quantization: int8, deployments: {c: {quantization: int8}}}}"
    )
    assert list(make_plan(config).engines) == ["a/b"]
    entry = config.models["a/b"]
    assert engine_config(entry, config.defaults).quantization == "int8"


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
        ("models:\n  a/b: {source: x, tensor_parallel: 2}\n", "2:37", "tensor_parallel"),
        ("models:\n  a/b: {source: x, speech: y/z}\n", "2:28", "speech"),
        ("models:\n  a/b: {source: x, fim: {prefix: a}}\n", "2:25", "fim"),
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
