"""How known families fill in the middle: their tokens, and the order that they were trained on.

psm     PREFIX before SUFFIX after MIDDLE          the model goes on with what belongs between
spm     SUFFIX after PREFIX before [MIDDLE]
spm2    PREFIX SUFFIX after MIDDLE before          (Bavarian et al., 2022: "SPM variant 2")

DeepSeek's begin, hole and end are the prefix, suffix and middle tokens of psm. Where each comes from:

    starcoder        the StarCoder 2 paper's data format; Granite Code's first models took the tokens over
    santacoder       SantaCoder's model card
    codegemma        CodeGemma's prompt structure and model card, which name the same terminators
    qwen2.5-coder    the file- and repository-level examples of Qwen's repository, their eos_token_ids included
    granite          the tokenizer of Granite 4
    deepseek-coder   DeepSeek-Coder's insertion example; its chat models end with <|EOT|>
    codellama        Code Llama's infilling format; the suffix is encoded without a space's mark before it
    codestral        encode_fim of mistral-common: nothing stands between prefix and completion
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenmill.server.config import FimMarkup

_BARS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")

PRESETS: Mapping[str, FimMarkup] = {
    "starcoder": FimMarkup(
        prefix="<fim_prefix>",
        suffix="<fim_suffix>",
        middle="<fim_middle>",
        stop=("<fim_pad>", "<filename>", "<reponame>", "<|endoftext|>"),
        repo="<repo_name>",
        file="<file_sep>",
    ),
    "santacoder": FimMarkup(
        prefix="<fim-prefix>",
        suffix="<fim-suffix>",
        middle="<fim-middle>",
        stop=("<fim-pad>", "<|endoftext|>"),
    ),
    "codegemma": FimMarkup(prefix=_BARS[0], suffix=_BARS[1], middle=_BARS[2], file="<|file_separator|>"),
    "qwen2.5-coder": FimMarkup(
        prefix=_BARS[0],
        suffix=_BARS[1],
        middle=_BARS[2],
        stop=("<|fim_pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        repo="<|repo_name|>",
        file="<|file_sep|>",
    ),
    "granite": FimMarkup(
        prefix=_BARS[0],
        suffix=_BARS[1],
        middle=_BARS[2],
        stop=("<|fim_pad|>", "<|end_of_text|>"),
        repo="<|reponame|>",
        file="<|filename|>",
    ),
    "deepseek-coder": FimMarkup(
        prefix="<｜fim▁begin｜>", suffix="<｜fim▁hole｜>", middle="<｜fim▁end｜>", stop=("<|EOT|>",)
    ),
    "codellama": FimMarkup(prefix="▁<PRE>", suffix="▁<SUF>", middle="▁<MID>", stop=("▁<EOT>",)),
    "codestral": FimMarkup(prefix="[PREFIX]", suffix="[SUFFIX]", order="spm"),
}
"""What `fim: auto` looks for. A vocabulary must have the first two or three tokens and may lack any other; of
several that fit, the one whose tokens for other files are there too is taken."""


def stop_tokens(markup: FimMarkup, name: str | None) -> tuple[str | int, ...]:
    """Everything that ends what is filled in.

    Families share tokens, so a detected one also stops at what the others of the same tokens stop at.
    """
    own = [markup]
    if name is not None:
        own += [
            other
            for other in PRESETS.values()
            if (other.prefix, other.suffix, other.middle) == (markup.prefix, markup.suffix, markup.middle)
        ]
    ends = [
        token
        for item in own
        for token in (item.prefix, item.suffix, item.middle, item.repo, item.file, *item.stop)
    ]
    return tuple(dict.fromkeys(token for token in ends if token is not None))
