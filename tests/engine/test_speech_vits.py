"""VITS checkpoints: spoken as transformers does, refused with one line where they can't be."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import copy_of, edit_json, session_folder, tiny
from safetensors.torch import load_file, save_file
from transformers import VitsModel, VitsTokenizer

from tokenmill.engine import speech_vits
from tokenmill.engine.config import SpeechConfig
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.resample import Samples
from tokenmill.engine.speech import LoadedSpeech, load_speech
from tokenmill.engine.tiny import main
from tokenmill.engine.tiny_speech import make_tiny_vits


@cache
def voices(speakers: int) -> Path:
    """A tiny checkpoint that every test shares: don't write into it."""
    return make_tiny_vits(session_folder() / f"vits-{speakers}", speakers=speakers)


def load(folder: Path | str, **fields: Any) -> LoadedSpeech:
    return load_speech(SpeechConfig(source=str(folder), device="cpu", **fields), lambda stage, done: None)


def refusal(folder: Path | str, **fields: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load(folder, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def alike(first: Samples, second: Samples) -> bool:
    """Equal but for rounding: where tensors lie in memory may change the order of a sum."""
    return first.shape == second.shape and bool(np.abs(first - second).max(initial=0.0) < 1e-4)


@pytest.mark.parametrize("text", ["a", "The mill stands by the river.", "Well, it's 12 — isn't it?"])
@pytest.mark.parametrize("speakers", [1, 3])
def test_samples_are_transformers_own(text: str, speakers: int) -> None:
    loaded = load(voices(speakers))
    model: Any = VitsModel.from_pretrained(voices(speakers)).eval()
    make: Any = VitsTokenizer
    inputs = make.from_pretrained(voices(speakers))(text, return_tensors="pt")
    for voice in loaded.ready.voices:
        torch.manual_seed(5)
        with torch.no_grad():
            expected = model(inputs["input_ids"], speaker_id=int(voice) if speakers > 1 else None).waveform[0]
        made = loaded.speaker.speak(text, voice, 5)
        assert made.dtype == np.float32
        assert alike(made, expected.numpy())


def test_voice_and_seed_make_the_sound() -> None:
    speaker = load(voices(3)).speaker
    text = "the mill"
    same, again = speaker.speak(text, "1", 5), speaker.speak(text, "1", 5)
    assert alike(same, again)
    for other in (speaker.speak(text, "1", 6), speaker.speak(text, "2", 5), speaker.speak(text, "1", None)):
        assert not alike(same, other)
    assert not alike(speaker.speak(text, "1", None), speaker.speak(text, "1", None))


@pytest.mark.parametrize("text", ["", " ", "水車", "12345 67"])
def test_letters_that_it_does_not_know_are_not_spoken(text: str) -> None:
    assert len(load(voices(1)).speaker.speak(text, "0", 1)) == 0
    mixed = load(voices(1)).speaker.speak(f"a mill{text.strip()}", "0", 1)
    assert alike(mixed, load(voices(1)).speaker.speak("a mill", "0", 1))


def test_what_the_front_end_is_told() -> None:
    ready = load(voices(3)).ready
    assert (ready.voices, ready.sample_rate, ready.model_type) == (["0", "1", "2"], 16000, "vits")
    assert ready.description.startswith("vits, 0.0")
    assert load(voices(1)).ready.voices == ["0"]


def test_voices_may_have_further_names(tmp_path: Path) -> None:
    loaded = load(voices(3), voices={"alloy": "2", "1": "0"})
    assert loaded.ready.voices == ["alloy", "1", "0", "2"]
    assert loaded.names == {"alloy": "2", "1": "0", "0": "0", "2": "2"}
    assert "the voice 7, which isn't among 0, 1, 2" in refusal(voices(3), voices={"alloy": "7"})
    named = copy_of(voices(3), tmp_path / "named")
    edit_json(named / "config.json", id2label={"0": "ann", "1": "ben", "2": "cem"}, label2id=None)
    assert load(named).ready.voices == ["ann", "ben", "cem"]


def test_the_older_names_of_weights_are_read(tmp_path: Path) -> None:
    """Checkpoints from before torch's parametrizations name the halves of a weight norm weight_g and weight_v."""
    folder = copy_of(voices(1), tmp_path / "older")
    weights = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): weight
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    assert any(name.endswith("weight_g") for name in weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    text = "the mill"
    older, newer = (load(x).speaker.speak(text, "0", 1) for x in (folder, voices(1)))
    assert alike(older, newer)


def test_special_tokens_beyond_the_vocabulary_are_never_read(tmp_path: Path) -> None:
    """MMS' tokenizers have an <unk> that the model has no embedding for."""
    folder = copy_of(voices(1), tmp_path / "unk")
    edit_json(folder / "tokenizer_config.json", unk_token="<unk>", normalize=False, added_tokens_decoder=None)
    speaker = load(folder).speaker
    assert len(speaker.speak("水車", "0", 1)) == 0
    assert len(speaker.speak("<unk>", "0", 1)) == 0
    assert len(speaker.speak("a 水 mill", "0", 1)) > 0


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        load(voices(1), threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_other_types_are_refused(tmp_path: Path) -> None:
    assert "a llama can't be spoken with here; speech checkpoints are of the type vits" in refusal(
        tiny("llama")
    )
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "not from a GGUF file" in refusal(tmp_path / "x.gguf")
    assert "no such file or folder" in refusal(tmp_path / "nowhere")


def test_what_its_text_needs_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        return None if name in ("phonemizer", "uroman") else find_spec(name)

    monkeypatch.setattr(speech_vits, "find_spec", without)
    for key, package in (("phonemize", "phonemizer"), ("is_uroman", "uroman")):
        folder = copy_of(voices(1), tmp_path / key)
        edit_json(folder / "tokenizer_config.json", **{key: True})
        assert f"pip install {package}" in refusal(folder)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = copy_of(voices(1), tmp_path / "no-vocab")
    (folder / "vocab.json").unlink()
    assert "vocab.json" in refusal(folder)
    folder = copy_of(voices(1), tmp_path / "wide")
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "a": 500}))
    assert "ids up to 500" in refusal(folder)
    folder = copy_of(voices(1), tmp_path / "other-config")
    edit_json(folder / "config.json", hidden_size=32)
    assert "don't fit together" in refusal(folder)
    folder = copy_of(voices(1), tmp_path / "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin may hold code" in refusal(folder)


def test_the_command_makes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "voice"
    assert (
        main(["--type", "vits", "--out", str(out), "--voices", "2", "--layers", "1", "--hidden", "16"]) == 0
    )
    assert capsys.readouterr().out == f"{out}: a random vits of 1 layers, float32\n"
    assert load(out).ready.voices == ["0", "1"]
    for wrong in (["--type", "vits", "--vocab", "300"], ["--type", "llama", "--voices", "2"]):
        with pytest.raises(SystemExit) as caught:
            main([*wrong, "--out", str(tmp_path / "wrong")])
        assert caught.value.code == 1
    assert not (tmp_path / "wrong").exists()
