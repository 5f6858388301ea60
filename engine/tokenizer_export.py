"""A checkpoint's tokenizer as plain data for the front end, which runs it without transformers.

transformers decides which tokenizer the files make (its class may change the post-processor, the added
tokens or the template), and takes seconds over it. So its result is kept in the cache folder under a hash of
the files; the next start reads that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tokenmill.engine.disk_cache import cache_root, key_of, write_file
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.messages import TokenizerInfo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

FORMAT = 2
MARK = "tokenmillmark"
SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")


def load_tokenizer_info(folder: Path, config: PreTrainedConfig, hub_id: str) -> TokenizerInfo:
    """The tokenizer of a checkpoint's folder, from the cache when these very files were met before.

    `hub_id` is the repository that the folder came from, if any: transformers knows a few by name.
    """
    file = cache_root() / "tokenizers" / f"{_key(folder, hub_id)}.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=TokenizerInfo)
    except (OSError, msgspec.DecodeError):
        info = export_tokenizer(_auto_tokenizer(folder, config, hub_id), ending_ids(folder, config))
    try:
        write_file(file, msgspec.json.encode(info))
    except OSError:
        return info  # the loader says once that the cache can't be written
    return info


def export_tokenizer(tokenizer: PreTrainedTokenizerBase, end: Iterable[int]) -> TokenizerInfo:
    """`tokenizer` as data.

    A generation ends at the ids `end`, those at which transformers' `generate` would stop, or at the
    tokenizer's EOS where there are none. It also ends at the token by which the chat template ends an
    assistant's turn: fine-tunes often keep the generation config of a base model, which knows no turns.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LoadError(f"its {type(tokenizer).__name__} has no form that the tokenizers library can run")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    special = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    eos: Any = tokenizer.eos_token_id
    bos: Any = tokenizer.bos_token_id
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise LoadError("its tokenizer has no vocabulary")
    template = _one_template(tokenizer.chat_template)
    ends = set(end) or ({eos} if isinstance(eos, int) else set())
    ends |= _turn_end(template, special, backend)
    return TokenizerInfo(
        tokenizer_json=backend.to_str(),
        chat_template=template,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        special_tokens=special,
        bos_id=bos if isinstance(bos, int) else None,
        eos_ids=sorted(ends),
        vocab_size=max(vocabulary.values()) + 1,
    )


def _turn_end(template: str | None, special: dict[str, str], backend: Any) -> set[int]:
    """The special token that the template writes right behind an assistant's last words, if it writes one."""
    from tokenmill.engine.chat_template import ChatTemplate, TemplateFault

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
    try:
        text = ChatTemplate(template or "", special).render(messages, add_generation_prompt=False)
    except TemplateFault:  # one that wants more of a conversation tells nothing of its ends
        return set()
    behind = text.rpartition(MARK)[2].lstrip() if MARK in text else ""
    special_ids = {x.content: i for i, x in backend.get_added_tokens_decoder().items() if x.special}
    found = max((x for x in special_ids if x and behind.startswith(x)), key=len, default=None)
    return set() if found is None else {special_ids[found]}


def ending_ids(folder: Path | None, config: PreTrainedConfig) -> set[int]:
    """The ids at which `generate` would stop: those of the folder's generation config, else the config's."""
    file = folder / "generation_config.json" if folder is not None else None
    try:
        fields = json.loads(file.read_bytes()) if file is not None and file.exists() else {}
    except ValueError as error:
        raise LoadError(f"generation_config.json is no JSON ({first_line(error)})") from None
    found = fields.get("eos_token_id") if isinstance(fields, dict) else None
    for place in (config, config.get_text_config(decoder=True)):
        if found is None:
            found = getattr(place, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    return {x for x in ids if type(x) is int and x >= 0}


def _auto_tokenizer(folder: Path, config: PreTrainedConfig, hub_id: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    config.name_or_path = hub_id or str(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # every tokenizer class has its own ways to fail on bad files
        if "trust_remote_code" in str(error):
            raise LoadError(
                "its tokenizer needs code of its own (auto_map in tokenizer_config.json), which is never run"
            ) from None
        raise LoadError(
            f"its tokenizer can't be read ({first_line(error)}); tokenizer.json should lie in the folder"
        ) from None
    return tokenizer


def _one_template(template: str | dict[str, str] | None) -> str | None:
    """One template out of several, as transformers chooses: `tool_use` when there are tools, else `default`.

    Jinja drops the newline after a block tag and one at the template's end, and strips blanks before a tag:
    the newline after `if` and the plus sign keep both texts as they are.
    """
    if not isinstance(template, dict):
        return template
    default, tools = template.get("default"), template.get("tool_use")
    if default is None or tools is None:
        return default or tools
    default, tools = default.removesuffix("\n"), tools.removesuffix("\n")
    return f"{{% if tools %}}\n{tools}{{%+ else %}}\n{default}{{%+ endif %}}"


def _key(folder: Path, hub_id: str) -> str:
    """All that `load_tokenizer_info` depends on: the small files, the repository's name, the libraries."""
    parts: list[object] = [FORMAT, hub_id, version("transformers"), version("tokenizers")]
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(x for x in folders if x == "additional_chat_templates")
        for file in sorted(x for x in files if x.endswith(SUFFIXES)):
            parts += [file, Path(root, file).read_bytes()]
    return key_of(*parts)
