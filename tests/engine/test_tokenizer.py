"""The tokenizer against the `tokenizers` library, for each kind of decoder; the bounds of templates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from tokenmill.engine.chat_template import ChatTemplate, TemplateFault
from tokenmill.engine.messages import TokenizerInfo
from tokenmill.engine.tokenizer import Tokenizer, text_stream

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def info(library: Library, **fields: object) -> TokenizerInfo:
    size = library.get_vocab_size(with_added_tokens=True)
    return TokenizerInfo(tokenizer_json=library.to_str(), vocab_size=size, **fields)  # type: ignore[arg-type]


def byte_level() -> Library:
    vocab = {character: i for i, character in enumerate(ALPHABET)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    library = Library(models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens(["<tool>", "two words", AddedToken("é", normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))]
    )
    return library


def byte_fallback() -> Library:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for piece in ["▁", "a", "b", "é", "▁a", "▁b", "ab", "▁▁"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "▁")]
    library = Library(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def metaspace() -> Library:
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.0), ("▁a", -1.5), ("▁b", -1.5), ("ab", -1.8)]
    library = Library(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return library


def word_piece() -> Library:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "##a": 3, "b": 4, ".": 5}
    library = Library(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    return library


def bpe_suffix() -> Library:
    vocab = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4}
    library = Library(models.BPE(vocab=vocab, merges=[("a", "b</w>")], end_of_word_suffix="</w>"))
    library.decoder = decoders.BPEDecoder(suffix="</w>")
    return library


def undecoded() -> Library:
    return Library(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "bpe_suffix": bpe_suffix,
    "undecoded": undecoded,
}
LIBRARIES = {name: make() for name, make in KINDS.items()}
TOKENIZERS = {name: Tokenizer(info(library)) for name, library in LIBRARIES.items()}


def id_lists(name: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, LIBRARIES[name].get_vocab_size(with_added_tokens=True) - 1), max_size=30)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("byte_level", True),
        ("byte_fallback", True),
        ("metaspace", True),
        ("word_piece", False),
        ("bpe_suffix", False),
        ("undecoded", False),
    ],
)
def test_byte_exact_is_known_from_the_decoder(name: str, exact: bool) -> None:
    assert TOKENIZERS[name].byte_exact is exact


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ["byte_level", "metaspace", "word_piece", "bpe_suffix", "undecoded"])
@given(data=st.data())
def test_decode_equals_the_librarys(name: str, skip: bool, data: st.DataObject) -> None:
    ids = data.draw(id_lists(name))
    assert TOKENIZERS[name].decode(ids, skip) == LIBRARIES[name].decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=30))
def test_byte_fallback_decodes_every_text_as_the_library_does(text: str) -> None:
    ids = LIBRARIES["byte_fallback"].encode(text).ids
    assert TOKENIZERS["byte_fallback"].decode(ids) == LIBRARIES["byte_fallback"].decode(ids)


@pytest.mark.parametrize("name", list(KINDS))
@given(data=st.data())
def test_stream_equals_decode(name: str, data: st.DataObject) -> None:
    ids = data.draw(id_lists(name))
    stream = text_stream(TOKENIZERS[name])
    assert "".join([stream.feed(token) for token in ids]) + stream.flush() == TOKENIZERS[name].decode(ids)


@pytest.mark.parametrize("name", list(KINDS))
@given(data=st.data())
def test_stream_after_a_prompt_continues_its_text(name: str, data: st.DataObject) -> None:
    prompt, ids = data.draw(id_lists(name)), data.draw(id_lists(name))
    stream = text_stream(TOKENIZERS[name], prompt)
    text = "".join([stream.feed(token) for token in ids]) + stream.flush()
    whole = TOKENIZERS[name].decode(prompt + ids)
    assert whole.endswith(text)
    before = TOKENIZERS[name].decode(prompt)
    if not before.endswith("�"):
        assert before + text == whole


def test_stream_completes_a_character_of_the_prompt() -> None:
    first, second = (TOKENIZERS["byte_level"].encode("€", add_special_tokens=False)[i::2] for i in (0, 1))
    ids = TOKENIZERS["byte_level"].encode("€", add_special_tokens=False)
    assert len(first) + len(second) == 3
    stream = text_stream(TOKENIZERS["byte_level"], ids[:2])
    assert stream.feed(ids[2]) == "€"


def test_stream_after_a_prompt_keeps_its_leading_space() -> None:
    for name in ("byte_fallback", "metaspace"):
        library, tokenizer = LIBRARIES[name], TOKENIZERS[name]
        token = library.token_to_id("▁a")
        assert text_stream(tokenizer, [token]).feed(token) == " a"
        assert text_stream(tokenizer, []).feed(token) == "a"
    bos = LIBRARIES["byte_fallback"].token_to_id("<s>")
    assert (
        text_stream(TOKENIZERS["byte_fallback"], [bos]).feed(LIBRARIES["byte_fallback"].token_to_id("▁a"))
        == "a"
    )


def test_special_tokens_of_a_text_are_parsed_or_split() -> None:
    library, tokenizer = LIBRARIES["byte_level"], TOKENIZERS["byte_level"]
    end, start = library.token_to_id("</s>"), library.token_to_id("<s>")
    assert tokenizer.encode("hell</s>") == [start, library.token_to_id("hell"), end]
    assert tokenizer.encode("hell</s>", add_special_tokens=False) == [library.token_to_id("hell"), end]
    split = tokenizer.encode("hell</s>", add_special_tokens=False, split_special=True)
    assert end not in split
    assert tokenizer.decode(split) == "hell</s>"
    assert tokenizer.encode("</s>", add_special_tokens=False) == [end], (
        "splitting leaves the parser as it was"
    )


def test_encode_batch_equals_encode() -> None:
    texts = ["hell", "", "two words", "é€"]
    tokenizer = TOKENIZERS["byte_level"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_token_bytes_and_text() -> None:
    library, tokenizer = LIBRARIES["byte_level"], TOKENIZERS["byte_level"]
    partial = tokenizer.encode("€", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in partial) == "€".encode()
    assert tokenizer.token_text(partial[0]) == "�"
    assert tokenizer.token_text(library.token_to_id("Ġw")) == " w"
    assert tokenizer.token_bytes(library.token_to_id("two words")) == b"two words"
    assert tokenizer.token_bytes(10**6) == b""
    fallback = TOKENIZERS["byte_fallback"]
    assert fallback.token_bytes(LIBRARIES["byte_fallback"].token_to_id("<0xE2>")) == b"\xe2"
    assert fallback.token_text(LIBRARIES["byte_fallback"].token_to_id("▁a")) == " a"


def test_settings_of_training_are_dropped() -> None:
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=8)
    assert len(Tokenizer(info(library)).encode("abcd")) == 5


def test_a_tokenizer_made_again_is_the_librarys_same_object() -> None:
    def contents() -> TokenizerInfo:
        return info(byte_level())

    loaded, again = Tokenizer(contents()), Tokenizer(contents())
    assert again._library is loaded._library
    assert again._splitting is loaded._splitting
    assert again._splitting is not loaded._library
    assert Tokenizer(info(metaspace()))._library is not loaded._library


def test_a_broken_tokenizer_is_one_value_error() -> None:
    with pytest.raises(ValueError, match="can't be read"):
        Tokenizer(TokenizerInfo(tokenizer_json="{}", vocab_size=0))


def test_longest_token() -> None:
    assert TOKENIZERS["byte_level"].longest_token == len("two words")


def test_chat_template_sees_special_tokens_and_variables() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if loop.last %}!{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ mood }}{{ image_token }}"
    )
    tokenizer = Tokenizer(
        info(byte_level(), chat_template=template, bos_token="<s>", special_tokens={"image_token": "<img>"})
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render(messages, mood="calm") == "<s>[user]a[assistant]b!>calm<img>"
    assert Tokenizer(info(byte_level())).chat_template is None


def test_template_language_is_that_of_transformers() -> None:
    source = (
        "  {% if tools %}\n{{ tools | tojson }}\n{% endif %}\n"
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% set ns.n = loop.length %}{% endfor %}"
        "{{ ns.n }}{{ dict(a=1).a }}{{ strftime_now('%%') }}"
    )
    messages = [{"content": "<é>"}] * 3
    assert ChatTemplate(source, {}).render(messages, tools=[{"k": "<é>"}]) == '[{"k": "<é>"}]\n<é><é>31%'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{{ messages.__class__ }}{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.at_all }}",
    ],
)
def test_template_faults_are_one_error_and_bounded(source: str) -> None:
    with pytest.raises(TemplateFault):
        ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])


def test_template_that_does_not_compile() -> None:
    with pytest.raises(TemplateFault, match="can't be compiled"):
        ChatTemplate("{% for %}", {})
