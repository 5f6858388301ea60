"""Text to token ids and back with the `tokenizers` library alone: nothing here imports torch or transformers.

Most decoders map each token to bytes whatever stands beside it (byte-level BPE, byte fallback, metaspace).
For those `token_bytes` is exact, a text is the UTF-8 of the concatenated bytes, and decoding a stream costs
O(1) a token. `TokenBytes` reads that mapping from the serialised decoder; for a decoder that it can't read
(WordPiece, BPE suffixes, regular expressions) `byte_exact` is False and the library decodes whole windows.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import msgspec
import tokenizers

from tokenmill.engine.messages import TokenizerInfo

if TYPE_CHECKING:
    from tokenmill.engine.chat_template import ChatTemplate

KEPT_LIBRARIES = 16
"""The library's objects that are kept. A model has one, or two where special tokens in a text must stay text."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class TokenBytes(msgspec.Struct, frozen=True):
    """How a token's string becomes bytes, when that doesn't depend on its neighbours."""

    byte_level: bool = False
    byte_fallback: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    strip: str = ""
    """Characters dropped from the very beginning of a text, each at most once and in this order."""
    first_drops: str = ""
    """A character dropped wherever it stands in the very first token."""

    def encode(self, token: str, first: bool = False) -> bytes:
        """The bytes of one token; `first` when no token stands before it."""
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match.group(1))
        if self.byte_level:
            try:
                return bytes([_ALPHABET[character] for character in token])
            except KeyError:
                return token.encode()
        if first and self.first_drops:
            token = token.replace(self.first_drops, "")
        for old, new in self.replace:
            token = token.replace(old, new)
        return token.encode()


def read_decoder(serialised: str) -> TokenBytes | None:
    """The byte mapping of a serialised decoder, or None where a token's text needs its neighbours."""
    decoder = json.loads(serialised)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    byte_level = byte_fallback = fused = False
    replace: list[tuple[str, str]] = []
    strip = first_drops = ""
    for step in steps:
        match step:
            case {"type": "ByteLevel"} if not replace:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                len(old) == 1 and not byte_level
            ):
                replace.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": scheme} if not byte_level:
                replace.append((mark, " "))
                first_drops = "" if scheme == "never" else mark
            case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0} if fused:
                strip = content * start
            case _:
                return None
    if not (byte_level or byte_fallback or replace):
        return None
    return TokenBytes(byte_level, byte_fallback, tuple(replace), strip, first_drops)


class Tokenizer:
    """One model's tokenizer and chat template, made from what the engine process sent.

    Raises `ValueError` when the serialised tokenizer can't be read.
    """

    def __init__(self, info: TokenizerInfo) -> None:
        self.info = info
        self._library = _load(info.tokenizer_json)
        added = self._library.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, content in added.items() if content.special)
        decoder = self._library.decoder
        self._rules = None if decoder is None else read_decoder(decoder.__getstate__().decode())
        self._bytes: dict[int, bytes] = {}

    @property
    def byte_exact(self) -> bool:
        """Whether a text is always the UTF-8 of its tokens' bytes, one after the other."""
        return self._rules is not None

    @cached_property
    def _splitting(self) -> tokenizers.Tokenizer:
        """A second instance for `split_special`: the setting is the object's, which threads share."""
        return _load(self.info.tokenizer_json, split_special=True)

    def view(self, chat_template: str | None = None, visible: Collection[int] = ()) -> Tokenizer:
        """The same tokenizer with another chat template, or with special tokens that decode like plain ones.

        The second needs `byte_exact`: other decoders leave special tokens out by themselves.
        """
        view = copy.copy(self)
        view.special_ids = self.special_ids.difference(visible)
        if chat_template is not None:
            view.info = msgspec.structs.replace(self.info, chat_template=chat_template)
            view.__dict__.pop("chat_template", None)
        return view

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest vocabulary entry: no token stands for more of a text."""
        return max((len(token) for token in self._library.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True, split_special: bool = False) -> list[int]:
        """Token ids of a text, encoded as the model's tokenizer does it.

        Special tokens written in the text are parsed as such, unless `split_special`: then they are plain
        text, so that user input can't forge them. `add_special_tokens` adds what the tokenizer puts around
        a text (BOS, say).
        """
        return self.encode_batch([text], add_special_tokens, split_special)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, split_special: bool = False
    ) -> list[list[int]]:
        """Token ids of each text. Lets other threads run meanwhile."""
        library = self._splitting if split_special else self._library
        encodings = library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of whole ids; bytes that aren't UTF-8 become U+FFFD. Ids without a token have no text."""
        if self._rules is None:
            return self._library.decode(list(ids), skip_special_tokens=skip_special_tokens)
        stream = ByteTextStream(self, skip_special_tokens=skip_special_tokens)
        return "".join([stream.feed(token) for token in ids]) + stream.flush()

    def decode_window(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The library's own decoding, for tokenizers that aren't `byte_exact`."""
        return self._library.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for in the middle of a text."""
        cached = self._bytes.get(token)
        if cached is None:
            cached = self._bytes[token] = self._token_bytes(token, first=False)
        return cached

    def first_token_bytes(self, token: int) -> bytes:
        """The bytes of a token that begins a text: some tokenizers drop its leading space mark."""
        return self._token_bytes(token, first=True)

    def _token_bytes(self, token: int, first: bool) -> bytes:
        content = self._library.id_to_token(token)
        if content is None:
            return b""
        if self._rules is None:
            return self._library.decode([token], skip_special_tokens=False).encode()
        return self._rules.encode(content, first)

    @property
    def leading_strip(self) -> str:
        """What is dropped from the very beginning of a text (a space, with most SentencePiece models)."""
        return "" if self._rules is None else self._rules.strip

    def token_text(self, token: int) -> str:
        """A token decoded alone, its leading space kept; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The compiled chat template, or None where the model has none. `TemplateFault` when it is broken."""
        if self.info.chat_template is None:
            return None
        # Imported only now: a server that renders no template starts without Jinja.
        from tokenmill.engine.chat_template import ChatTemplate

        special = dict(self.info.special_tokens)
        if self.info.bos_token is not None:
            special.setdefault("bos_token", self.info.bos_token)
        if self.info.eos_token is not None:
            special.setdefault("eos_token", self.info.eos_token)
        return ChatTemplate(self.info.chat_template, special)


class ByteTextStream:
    """Text of a stream of tokens, for `byte_exact` tokenizers: whole characters as soon as they are whole.

    `prompt` is what stands before the stream: the bytes of a character that it leaves unfinished belong to
    the stream's first character, and a stream after a prompt keeps its leading space.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Four tokens hold at least the four bytes that one character may have.
        self._decoder.decode(b"".join(tokenizer.token_bytes(token) for token in prompt[-4:]))
        self._first = all(token in tokenizer.special_ids for token in prompt)
        self._strip = tokenizer.leading_strip if self._first else ""

    def feed(self, token: int) -> str:
        """The characters that this token completes."""
        if token in self._skipped:
            return ""
        if self._first:
            self._first = False
            data = self._tokenizer.first_token_bytes(token)
        else:
            data = self._tokenizer.token_bytes(token)
        return self._stripped(self._decoder.decode(data))

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for an unfinished character."""
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._strip[0]:
                self._strip = ""
                break
            text, self._strip = text[1:], self._strip[1:]
        return text


class WindowTextStream:
    """The same for any other decoder: the difference between a short window with and without the news.

        … | read before, decoded again for its context | not released yet |

    Text that ends in U+FFFD may be an unfinished character: it waits, for four tokens at the most.
    """

    CONTEXT = 6
    PATIENCE = 4

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt[-self.CONTEXT :])
        self._read = len(self._window)

    def feed(self, token: int) -> str:
        """The characters that this token completes."""
        if not self._tokenizer.token_bytes(token) or (self._skip and token in self._tokenizer.special_ids):
            return ""
        self._window.append(token)
        return self._release(patience=self.PATIENCE)

    def flush(self) -> str:
        """What is left when no more tokens come."""
        return self._release(patience=0)

    def _release(self, patience: int) -> str:
        if self._read == len(self._window):
            return ""
        before = self._tokenizer.decode_window(self._window[: self._read], self._skip)
        text = self._tokenizer.decode_window(self._window, self._skip)[len(before) :]
        if text.endswith("�") and len(self._window) - self._read < patience:
            return ""
        if text:
            self._window = self._window[self._read :]
            self._read = len(self._window)
        return text


def text_stream(
    tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special_tokens: bool = True
) -> ByteTextStream | WindowTextStream:
    """The cheapest exact way to turn a stream of this tokenizer's ids into text."""
    kind = ByteTextStream if tokenizer.byte_exact else WindowTextStream
    return kind(tokenizer, prompt, skip_special_tokens)


@lru_cache(maxsize=KEPT_LIBRARIES)
def _load(serialised: str, split_special: bool = False) -> tokenizers.Tokenizer:
    """One object for the same content, since those that are dropped leave memory behind: a model that was restarted
    or loaded again encodes with the one that it had.
    """
    try:
        library = tokenizers.Tokenizer.from_str(serialised)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the tokenizer can't be read: {error}") from None
    # A file may carry the settings of its training runs.
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = split_special
    return library
