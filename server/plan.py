"""What a configuration asks for, before anything runs: names, variants, engines. Needs nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tokenmill.engine.config import EngineConfig, SpeechConfig
from tokenmill.engine.messages import Start
from tokenmill.server.config import (
    Config,
    Deployment,
    Entry,
    FimMarkup,
    Limits,
    SuffixWay,
    engine_config,
    speech_config,
)
from tokenmill.server.engine_process import ENGINE_COMMAND, EngineProcess


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """What a name stands for: a model's engine with this entry's or deployment's own settings."""

    name: str
    root: str
    """The entry's name; differs from `name` for a deployment."""
    engine: str
    """Key of the engine that serves it: the name of the entry, or of a deployment that has its own."""
    limits: Limits
    sampling: dict[str, Any]
    force: dict[str, Any]
    timeout_s: float
    chat_template: str | None = None
    """Text of the template that replaces the model's own."""
    tools: bool = True
    tool_parser: str = "auto"
    fim: FimMarkup | str | bool = "auto"
    suffix: SuffixWay = "tokens"
    predicts: bool = True
    """Whether drafts are made from a request's prediction."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that a configuration asks for, before anything runs."""

    variants: dict[str, Variant]
    aliases: dict[str, str]
    engines: dict[str, EngineConfig]
    entries: dict[str, Entry]
    """The entry that each engine comes from."""
    voices: dict[str, SpeechConfig]
    """What speaks an entry's answers, by the entry's name."""


def make_plan(config: Config) -> Plan:
    """Entries and deployments as variants. One engine an entry, and one a deployment quantized otherwise."""
    plan = Plan(variants={}, aliases={}, engines={}, entries={}, voices={})
    for name, entry in config.models.items():
        plan.engines[name], plan.entries[name] = engine_config(entry, config.defaults), entry
        if entry.speech is not None:
            plan.voices[name] = speech_config(entry, entry.speech, config.defaults)
        timeout_s = entry.timeout_s or config.defaults.timeout_s
        plan.variants[name] = Variant(
            name=name,
            root=name,
            engine=name,
            limits=entry.limits,
            sampling=entry.sampling,
            force=entry.force,
            timeout_s=timeout_s,
            chat_template=_template(entry.chat_template),
            tools=entry.tools,
            tool_parser=entry.tool_parser,
            fim=entry.fim,
            suffix=entry.suffix,
            predicts=entry.speculation.prediction,
        )
        plan.aliases.update(dict.fromkeys(entry.aliases, name))
        for part, deployment in entry.deployments.items():
            own = f"{name}/{part}"
            plan.aliases.update(dict.fromkeys(deployment.aliases, own))
            plan.variants[own] = _deployment(own, plan.variants[name], deployment)
            if deployment.quantization not in (None, entry.quantization):
                plan.engines[own] = engine_config(entry, config.defaults, deployment.quantization)
                plan.entries[own] = entry
                plan.variants[own] = msgspec.structs.replace(plan.variants[own], engine=own)
    return plan


def _deployment(name: str, parent: Variant, deployment: Deployment) -> Variant:
    """The entry's variant with what the deployment gives itself."""
    limits = msgspec.structs.asdict(deployment.limits)
    own = {
        "timeout_s": deployment.timeout_s,
        "chat_template": _template(deployment.chat_template),
        "tools": deployment.tools,
        "tool_parser": deployment.tool_parser,
        "fim": deployment.fim,
        "suffix": deployment.suffix,
        "predicts": deployment.speculation.prediction,
    }
    return msgspec.structs.replace(
        parent,
        name=name,
        limits=msgspec.structs.replace(parent.limits, **_given(limits)),
        sampling={**parent.sampling, **deployment.sampling},
        force={**parent.force, **deployment.force},
        **_given(own),
    )


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _template(file: str | None) -> str | None:
    """The text of a template's file, which was readable when the configuration was checked."""
    return None if file is None else Path(file).expanduser().read_text(encoding="utf-8")


def spawn_preloaded(plan: Plan, command: Sequence[str] = ENGINE_COMMAND) -> dict[str, EngineProcess]:
    """Start the engine processes of all models that are to be loaded at once. Raises `OSError`."""
    return {
        name: EngineProcess.spawn(Start(config), command)
        for name, config in plan.engines.items()
        if plan.entries[name].load == "preload"
    }
