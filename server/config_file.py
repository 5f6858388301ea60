"""Reads `models.yaml`. What is wrong is refused with line, column and, for a key, the nearest known one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import yaml

from tokenmill.engine.sampling_params import SamplingParams
from tokenmill.server.config import TOOL_PARSERS, Config, Deployment, Entry, FimMarkup
from tokenmill.server.fim_presets import PRESETS

SAMPLING_KEYS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)
"""Request fields for which `sampling` may give another default and `force` a fixed value."""

_MODEL_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PART = re.compile(r"[\w.-]+", re.ASCII)
_ALIAS = re.compile(r"[\w./:@-]{1,200}", re.ASCII)


class ConfigError(ValueError):
    """The file can't be used. One line: file, line, column, what is wrong."""

    def __init__(self, message: str, mark: yaml.Mark | None = None) -> None:
        where = "" if mark is None else f"{mark.name}:{mark.line + 1}:{mark.column + 1}: "
        super().__init__(f"{where}{message}")


def load_config(path: Path) -> Config:
    """The checked contents of a `models.yaml`. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    return parse_config(text, str(path))


def parse_config(text: str, name: str = "models.yaml") -> Config:
    """The checked contents of a file's text; `name` stands in its errors. Raises `ConfigError`."""
    loader = yaml.SafeLoader(text)
    loader.name = name
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "not YAML"
        raise ConfigError(problem, error.problem_mark or error.context_mark) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise ConfigError(f"{name}:1:1: the file is empty; it needs `version: 1` and `models:`")
    _check_keys(root, set())
    config: Config = _convert(root, Config, "the file")
    _check_entries(config, root)
    return config


def _check_keys(node: yaml.Node, above: set[int]) -> None:
    """Keys are strings and none is given twice; no node contains itself."""
    if id(node) in above:
        raise ConfigError("an anchor that contains itself", node.start_mark)
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError("a key must be a plain string", key.start_mark)
            if key.value in seen:
                raise ConfigError(f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
            _check_keys(value, above)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, above)


def _convert(node: yaml.Node, kind: Any, what: str) -> Any:
    """The value of a node as `kind`: a struct, a map of structs, or anything that msgspec converts."""
    structs = [option for option in (kind, *get_args(kind)) if _is_struct(option)]
    if structs and get_origin(kind) is dict:
        return {key.value: _convert_struct(value, structs[0], key.value) for key, value in _items(node, what)}
    if structs and (structs[0] is kind or isinstance(node, yaml.MappingNode)):
        return _convert_struct(node, structs[0], what)
    value = _plain(node)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{what}: {error}", node.start_mark) from None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _convert_struct(node: yaml.Node, kind: type[msgspec.Struct], what: str) -> Any:
    types = get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in _items(node, what):
        if key.value not in fields:
            raise ConfigError(_unknown(key.value, list(fields), what), key.start_mark)
        values[key.value] = _convert(value, types[key.value], key.value)
    for name, field in fields.items():
        if field.required and name not in values:
            raise ConfigError(f"{what} needs the key {name!r}", node.start_mark)
    return kind(**values)


def _items(node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{what} must be a map of keys and values, not {kind}", node.start_mark)
    yield from node.value


def _plain(node: yaml.Node) -> Any:
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (yaml.MarkedYAMLError, ValueError) as error:
        raise ConfigError(f"can't be read: {' '.join(str(error).split())}", node.start_mark) from None


def _unknown(key: str, known: list[str], what: str) -> str:
    close = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
    return f"{what} has no key {key!r}{hint}"


def _node(root: yaml.Node, *path: str) -> yaml.Node:
    """The node at a path of keys, or the deepest one that the file spells out."""
    for name in path:
        if not isinstance(root, yaml.MappingNode):
            break
        found = [value for key, value in root.value if key.value == name]
        if not found:
            break
        root = found[0]
    return root


def _check_entries(config: Config, root: yaml.Node) -> None:
    """What a single value can't show: names and their collisions, sampling settings, what isn't there yet."""
    if not config.models:
        raise ConfigError("models must hold at least one model", _node(root, "models").start_mark)
    names: set[str] = set()
    for name, entry in config.models.items():
        path = ("models", name)
        if not _MODEL_NAME.fullmatch(name):
            raise ConfigError(
                f"a model's name is vendor/model_name, not {name!r}", _node(root, *path).start_mark
            )
        _check_new(names, [name], _node(root, *path))
        _check_new(names, entry.aliases, _node(root, *path, "aliases"))
        _check_entry(entry, root, path)
        _check_ranks(entry, config, root, path)
        for part, deployment in entry.deployments.items():
            below = (*path, "deployments", part)
            if not _PART.fullmatch(part):
                raise ConfigError(f"{part!r} can't be a deployment's name", _node(root, *below).start_mark)
            _check_new(names, [f"{name}/{part}"], _node(root, *below))
            _check_new(names, deployment.aliases, _node(root, *below, "aliases"))
            _check_variant(deployment, root, below)


def _check_new(names: set[str], added: list[str], node: yaml.Node) -> None:
    for name in added:
        if not _ALIAS.fullmatch(name):
            raise ConfigError(f"{name!r} can't be a model's name", node.start_mark)
        if name in names:
            raise ConfigError(f"the name {name!r} is taken already", node.start_mark)
        names.add(name)


def _check_entry(entry: Entry, root: yaml.Node, path: tuple[str, ...]) -> None:
    if entry.speech == "":
        raise ConfigError("speech must name a Hub id or a folder", _node(root, *path, "speech").start_mark)
    cache = entry.kv_cache
    if not 0 < cache.memory_share <= 1:
        raise ConfigError(
            "memory_share must be above 0 and at most 1", _node(root, *path, "kv_cache").start_mark
        )
    if cache.gib is not None and cache.gib <= 0:
        raise ConfigError("gib must be above 0", _node(root, *path, "kv_cache").start_mark)
    _check_variant(entry, root, path)


def _check_ranks(entry: Entry, config: Config, root: yaml.Node, path: tuple[str, ...]) -> None:
    """What can't be shared by several ranks, as far as the file shows it."""
    size, device = entry.tensor_parallel, entry.device or config.defaults.device
    if size == 1:
        return
    mark = _node(root, *path, "tensor_parallel").start_mark
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"tensor_parallel {size} takes the first {size} GPUs: device is cuda, not {device!r}", mark
        )
    if entry.quantization == "gguf":
        raise ConfigError(
            "tensor_parallel doesn't go with quantization gguf, whose blocks can't be cut", mark
        )
    if entry.deterministic is True and size > 2:
        raise ConfigError(
            "deterministic needs a tensor_parallel of at most 2: longer sums have no fixed order", mark
        )


def _check_variant(variant: Entry | Deployment, root: yaml.Node, path: tuple[str, ...]) -> None:
    """What entries and deployments may both say."""
    if isinstance(variant.fim, str) and variant.fim not in ("auto", *PRESETS):
        message = f"fim is auto, off, a map of tokens, or one of {', '.join(PRESETS)}; not {variant.fim!r}"
        raise ConfigError(message, _node(root, *path, "fim").start_mark)
    if variant.fim is True:
        raise ConfigError("fim: say auto instead of on", _node(root, *path, "fim").start_mark)
    if isinstance(variant.fim, FimMarkup) and variant.fim.middle is None and variant.fim.order != "spm":
        raise ConfigError(
            f"the order {variant.fim.order} needs a middle token", _node(root, *path, "fim").start_mark
        )
    if variant.tool_parser not in (None, "auto", *TOOL_PARSERS):
        message = f"tool_parser is auto or one of {', '.join(TOOL_PARSERS)}; not {variant.tool_parser!r}"
        raise ConfigError(message, _node(root, *path, "tool_parser").start_mark)
    if variant.chat_template is not None:
        try:
            Path(variant.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            message = f"chat_template can't be read: {error}"
            raise ConfigError(message, _node(root, *path, "chat_template").start_mark) from None
    _check_sampling(variant, root, path)


def _check_sampling(variant: Entry | Deployment, root: yaml.Node, path: tuple[str, ...]) -> None:
    for section, values in (("sampling", variant.sampling), ("force", variant.force)):
        node = _node(root, *path, section)
        for key in values:
            if key not in SAMPLING_KEYS:
                raise ConfigError(_unknown(key, list(SAMPLING_KEYS), section), node.start_mark)
        try:
            sampling_params(values)
        except ValueError as error:
            raise ConfigError(f"{section}: {error}", node.start_mark) from None


def sampling_params(values: dict[str, Any]) -> SamplingParams:
    """`sampling` or `force` as the engine's parameters, which check their bounds. `ValueError`."""
    values = dict(values)
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    if "max_tokens" not in values:
        values["max_tokens"] = max(SamplingParams().max_tokens, values.get("min_tokens", 0))
    try:
        return msgspec.convert(values, SamplingParams)
    except msgspec.ValidationError as error:  # no ValueError itself in msgspec 0.19
        raise ValueError(str(error)) from None
