"""Fill in the middle with a model's own tokens.

The tokens go in as ids; prompt and suffix are encoded so that no text of theirs can become one. Some
tokenizers don't mark their tokens as special, which is what `split_special` goes by: for those a second
tokenizer is made in which they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import msgspec

from tokenmill.engine.messages import TokenizerInfo
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.config import FimMarkup, FimOrder
from tokenmill.server.errors import bad_request
from tokenmill.server.fim_presets import PRESETS, stop_tokens

BORDER = "☺"
"""Encoded before a text to see its tokens without the mark that some tokenizers put before any text."""


class AddedToken(msgspec.Struct):
    """One of `added_tokens` in a serialised tokenizer."""

    id: int
    content: str
    special: bool = False


class _Serialised(msgspec.Struct):
    added_tokens: list[AddedToken] = []


def added_tokens(info: TokenizerInfo) -> dict[str, AddedToken]:
    """The tokens that a tokenizer knows beside its model's vocabulary, by their text."""
    document = msgspec.json.decode(info.tokenizer_json, type=_Serialised)
    return {token.content: token for token in document.added_tokens}


def encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on in the middle of a document; special tokens in it are plain text.

    Some tokenizers put a space's mark before any text. Behind another text there is none.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, split_special=True)
    if not ids or not tokenizer.token_bytes(ids[0]).startswith(b" "):
        return ids
    border = tokenizer.encode(BORDER, add_special_tokens=False, split_special=True)
    whole = tokenizer.encode(BORDER + text, add_special_tokens=False, split_special=True)
    return whole[len(border) :] if whole[: len(border)] == border else ids


class Fim:
    """How one model fills in the middle. Made once for each model and markup."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: tuple[int, int, int | None],
        order: FimOrder,
        stop: tuple[int, ...],
        plain: frozenset[int] = frozenset(),
        repo: int | None = None,
        file: int | None = None,
    ) -> None:
        """`tokens`: prefix, suffix and middle. `plain`: what isn't special to the tokenizer."""
        self.tokenizer = tokenizer
        self.order = order
        self.stop = stop
        self._prefix, self._suffix, self._middle = tokens
        self._markup = frozenset(token for token in tokens if token is not None)
        self._plain = plain
        self._repo, self._file = repo, file

    @property
    def context_tokens(self) -> int:
        """How many of the tokens for other files the model has."""
        return (self._repo is not None) + (self._file is not None)

    @property
    def ready(self) -> bool:
        """Whether `encode` is quick: the tokenizers that it needs have been made."""
        return "_safe" in self.__dict__

    @cached_property
    def _safe(self) -> Tokenizer:
        safe = self.tokenizer
        if self._plain:
            info = safe.info
            safe = Tokenizer(
                msgspec.structs.replace(info, tokenizer_json=_as_special(info.tokenizer_json, self._plain))
            )
        safe.encode("", split_special=True)
        return safe

    @cached_property
    def _before(self) -> list[int]:
        """What the tokenizer puts before any text: BOS, with some models."""
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a")
        return whole[: whole.index(bare[0])]

    def encode(self, text: str, param: str, *, inside: bool = False) -> list[int]:
        """Ids of a text in which no token of the markup can stand.

        `inside`: the text goes on in the middle of a document, so it gets no mark of a beginning. Raises
        `ApiError` 400 on `param` where the tokenizer can't keep the markup apart.
        """
        if inside:
            ids = encode_inside(self._safe, text)
        else:
            ids = self._safe.encode(text, add_special_tokens=False, split_special=True)
        if not self._markup.isdisjoint(ids):
            raise bad_request(f"{param} holds the tokens that this model fills in the middle with", param)
        return ids

    def encode_files(self, files: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of other files, by name and text, as the model knows them; one that doesn't gets their text."""
        if not files:
            return []
        marks = [] if self._file is None else [self._file]
        ids = [] if self._repo is None else [self._repo, *self.encode("repository\n", "input_extra")]
        for name, text in files:
            ids += marks + self.encode(f"{name}\n{text}\n", "input_extra")
        return ids + (marks + self.encode("current\n", "input_extra") if marks else [])

    def arrange(
        self,
        before: list[int],
        after: list[int],
        add_special_tokens: bool = True,
        files: Sequence[int] = (),
    ) -> list[int]:
        """The prompt for what stands between `before` and `after`; `files` are encoded already."""
        prefix, suffix = [self._prefix], [self._suffix]
        middle = [] if self._middle is None else [self._middle]
        start = [*(self._before if add_special_tokens else ()), *files]
        if self.order == "psm":
            return [*start, *prefix, *before, *suffix, *after, *middle]
        if self.order == "spm":
            return [*start, *suffix, *after, *prefix, *before, *middle]
        return [*start, *prefix, *suffix, *after, *middle, *before]


def make_fim(tokenizer: Tokenizer, wanted: FimMarkup | str | bool) -> Fim | None:
    """What an entry's `fim` means for its model; None where the model lacks the tokens."""
    if wanted is False:
        return None
    known = added_tokens(tokenizer.info)
    names = [wanted] if isinstance(wanted, str) and wanted != "auto" else list(PRESETS)
    options: Mapping[str | None, FimMarkup] = (
        {None: wanted} if isinstance(wanted, FimMarkup) else {name: PRESETS[name] for name in names}
    )
    found = [fim for name, markup in options.items() if (fim := _build(tokenizer, known, markup, name))]
    # Families share the first three tokens; what they call files and repositories tells them apart.
    return max(found, key=lambda fim: fim.context_tokens, default=None)


def _build(
    tokenizer: Tokenizer, known: dict[str, AddedToken], markup: FimMarkup, name: str | None
) -> Fim | None:
    prefix, suffix = _id(markup.prefix, known, tokenizer), _id(markup.suffix, known, tokenizer)
    middle = None if markup.middle is None else _id(markup.middle, known, tokenizer)
    if prefix is None or suffix is None or (middle is None and markup.middle is not None):
        return None
    ends = [_id(token, known, tokenizer) for token in stop_tokens(markup, name)]
    stop = tuple(dict.fromkeys(token for token in ends if token is not None))
    markup_ids = {prefix, suffix, middle}
    plain = frozenset(t.id for t in known.values() if not t.special and t.id in markup_ids | set(stop))
    repo = None if markup.repo is None else _id(markup.repo, known, tokenizer)
    file = None if markup.file is None else _id(markup.file, known, tokenizer)
    return Fim(tokenizer, (prefix, suffix, middle), markup.order, stop, plain, repo, file)


def _id(token: str | int, known: dict[str, AddedToken], tokenizer: Tokenizer) -> int | None:
    if isinstance(token, int):
        return token if token < tokenizer.info.vocab_size else None
    return known[token].id if token in known else None


def _as_special(serialised: str, ids: frozenset[int]) -> str:
    """The same tokenizer, with these added tokens marked as special."""
    document = msgspec.json.decode(serialised)
    for token in document["added_tokens"]:
        token["special"] = token["special"] or token["id"] in ids
    return msgspec.json.encode(document).decode()
