"""transformers' side of a checkpoint: its config and the class that runs it."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.progress import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint's folder, checked to be of a type that transformers knows."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quiet():
        fields, _ = PreTrainedConfig.get_config_dict(str(folder), local_files_only=True)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        close = get_close_matches(str(model_type), list(CONFIG_MAPPING), 1)
        hint = f" (nearest: {close[0]})" if close else ""
        if fields.get("auto_map"):
            hint = "; it asks for code of its own (auto_map), which is never run"
        raise LoadError(
            f"config.json has the model_type {model_type!r}, which this transformers doesn't know{hint}"
        )
    try:
        with quiet():
            config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # whatever a config class makes of values that it didn't expect
        raise LoadError(f"config.json makes no valid {model_type} config ({first_line(error)})") from None
    # Names a file of its own choosing to load, pickles included: only the standard names are read here.
    config.transformers_weights = None
    return config


def is_causal_lm(config: PreTrainedConfig) -> bool:
    """Whether transformers has a model that completes text for configs of this class."""
    return _class_for(config) is not None


def causal_lm_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The causal LM of `config`'s type as AutoModelForCausalLM picks it, and the config that it takes.

    A multi-modal checkpoint whose language model is one by itself gives that one and its own config; another one gives
    the class that reads pictures or sound, too, which then only gets text.
    """
    chosen = _class_for(config)
    if chosen is None:
        raise LoadError(f"a {config.model_type} is no causal language model, so it can't complete text")
    text_config = config.sub_configs.get("text_config")
    if text_config is not None and chosen.config_class is text_config:
        config = config.get_text_config(decoder=True)
    return chosen, config


def _class_for(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    from transformers.models.auto import modeling_auto

    # What has an encoder of its own beside a decoder, or no words at all, doesn't complete text.
    writes = not config.is_encoder_decoder and hasattr(config.get_text_config(decoder=True), "vocab_size")
    joint = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM") if writes else ()
    for task in ("CAUSAL_LM", *joint):
        classes = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING", {})
        if type(config) in classes:
            found: Any = classes[type(config)]
            chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return chosen
    return None
