"""VITS, which Meta's MMS voices of a thousand languages are too: characters or phonemes in, a waveform out.

(Kim, Kong, Son: "Conditional Variational Autoencoder with Adversarial Learning for End-to-End Text-to-Speech",
2021; Pratap et al.: "Scaling Speech Technology to 1,000+ Languages", 2023.)
"""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tokenmill.engine.checkpoint import Checkpoint
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.model_class import read_config
from tokenmill.engine.progress import Progress, quiet
from tokenmill.engine.resample import Samples
from tokenmill.engine.weights import read_weights


def load_vits(checkpoint: Checkpoint, device: torch.device, progress: Progress) -> VitsSpeaker:
    """The speaker of a checkpoint's folder, in float32; raises LoadError."""
    from transformers import VitsModel

    config: Any = read_config(checkpoint.folder)
    tokenizer = _tokenizer(checkpoint.folder)
    highest = max(tokenizer.encoder.values(), default=-1)
    if not 0 <= highest < config.vocab_size:
        raise LoadError(
            f"vocab.json has ids up to {highest}, config.json room for {config.vocab_size}: they don't fit"
        )
    # Splines and exponentials of the duration predictor lose what matters in 16 bits.
    module: Any = read_weights(
        checkpoint.folder, VitsModel, config, device, torch.float32, progress, paged=False
    )
    module.requires_grad_(False)
    module.eval()
    return VitsSpeaker(module, tokenizer, device)


def _tokenizer(folder: Path) -> Any:
    from transformers import VitsTokenizer

    make: Any = VitsTokenizer
    try:
        with quiet():
            tokenizer = make.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a missing or broken vocab.json fails in ways of its own
        raise LoadError(f"its tokenizer can't be read ({first_line(error)}); vocab.json is needed") from None
    if tokenizer.phonemize and find_spec("phonemizer") is None:
        raise LoadError(
            "it speaks phonemes: pip install phonemizer (GPL), and espeak-ng with your system's package manager"
        )
    if tokenizer.is_uroman and find_spec("uroman") is None:
        raise LoadError("its letters are written in Latin ones first: pip install uroman")
    return tokenizer


class VitsSpeaker:
    """A VITS model and its tokenizer."""

    def __init__(self, module: Any, tokenizer: Any, device: torch.device) -> None:
        self._module = module
        self._tokenizer = tokenizer
        self._device = device
        self.sample_rate = int(module.config.sampling_rate)
        self.voices = voice_names(module.config)
        self.parameters = sum(x.numel() for x in module.parameters())

    def speak(self, text: str, voice: str, seed: int | None) -> Samples:
        """One utterance as [samples]; see `Speaker`."""
        ids = self._ids(text)
        if not ids:
            return torch.zeros(0).numpy()
        # The model draws from torch's own generators. Nothing else in this process does.
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        speaker = self.voices.index(voice) if self._module.config.num_speakers > 1 else None
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=self._device)
            waveform = self._module(input_ids=inputs, speaker_id=speaker).waveform
        samples: Samples = waveform[0].float().cpu().numpy()
        return samples

    def _ids(self, text: str) -> list[int]:
        """What the model reads; nothing where all that it knows of the text is spaces.

        The tokenizer gives an id beyond the vocabulary to a character that isn't in it.
        """
        tokenizer, known = self._tokenizer, self._tokenizer.encoder
        written = tokenizer(text)["input_ids"]
        letters = written[1::2] if tokenizer.add_blank else written
        letters = [x for x in letters if x in tokenizer.decoder and x != known.get(tokenizer.unk_token)]
        if all(x == known.get(" ") for x in letters):
            return []
        if not tokenizer.add_blank:
            return letters
        return [0, *(x for letter in letters for x in (letter, 0))]


def voice_names(config: Any) -> list[str]:
    """The speakers of a config: by the names in `id2label` where it has its own, else by number."""
    count = max(1, int(config.num_speakers))
    labels = [str((config.id2label or {}).get(i, "")) for i in range(count)]
    given = all(labels) and len(set(labels)) == count and labels != [f"LABEL_{i}" for i in range(count)]
    return labels if given else [str(i) for i in range(count)]
