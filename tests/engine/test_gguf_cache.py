"""A GGUF file loads as the safetensors checkpoint that it was made from, and is converted once."""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import TEXTS, load, paged_logits, refusal, texts, tiny, tiny_gguf
from tokenizers import Tokenizer

from tokenmill.engine import gguf_cache, guards


def test_gguf_equals_its_safetensors(own_cache: Path, tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "model.gguf")
    ours, theirs = load(file), load(tiny("llama"))
    assert ours.dtype == torch.float32
    inputs = texts(320)
    found, wanted = paged_logits(ours.module, inputs), paged_logits(theirs.module, inputs)
    assert guards.relative_error(found, wanted) < 1e-6
    assert ours.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert ours.eos_ids == (2,)
    left = Tokenizer.from_str(ours.tokenizer.tokenizer_json)
    right = Tokenizer.from_str(theirs.tokenizer.tokenizer_json)
    assert (
        left.encode(TEXTS[0], add_special_tokens=False).ids
        == right.encode(TEXTS[0], add_special_tokens=False).ids
    )


def test_gguf_is_converted_once(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf(tmp_path / "model.gguf")
    first = load(file)
    convert = gguf_cache.convert
    calls = []
    monkeypatch.setattr(gguf_cache, "convert", lambda *x: calls.append(x[1]) or convert(*x))
    assert load(file).fingerprint == first.fingerprint
    assert not calls
    load(file, dtype="bfloat16")
    assert calls == [torch.bfloat16]
    file.touch()
    load(file)
    assert calls == [torch.bfloat16, torch.float32], "a file that changed is converted anew"
    assert len(list((own_cache / "gguf").glob("*/*"))) == 1, "and what was made of the old one is gone"


@pytest.mark.parametrize("obstacle", ["no folder", "disk full"])
def test_a_cache_that_cannot_be_written_costs_only_time(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tiny_gguf(tmp_path / "model.gguf")
    (tmp_path / "plain").touch()
    if obstacle == "no folder":
        monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "plain" / "cache"))
    else:
        monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("tempfile._mkstemp_inner", full)
        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with caplog.at_level(logging.WARNING):
        model = load(file)
    assert model.verdict.refusal is None
    inputs = texts(320)
    found, wanted = paged_logits(model.module, inputs), paged_logits(load(tiny("llama")).module, inputs)
    assert guards.relative_error(found, wanted) < 1e-6
    assert sum("can't be written" in record.getMessage() for record in caplog.records) == 1
    assert not list(tmp_path.glob("cache/gguf/*/*/.new-*")), "nothing half-made is left behind"


def test_a_corrupt_gguf_is_refused(own_cache: Path, tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.gguf is truncated" in refusal(file)


def test_a_gguf_of_an_unknown_architecture_is_refused(own_cache: Path, tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama", b"lampa"))
    assert "model.gguf (lampa) can't be converted by transformers 5." in refusal(file)


def test_a_half_written_entry_is_no_entry(own_cache: Path, tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "model.gguf")
    load(file)
    folder = gguf_cache.converted_folder(file, torch.float32)
    assert folder is not None
    shutil.rmtree(folder)
    folder.mkdir()
    assert load(file).parameters == load(tiny("llama")).parameters
