"""Small random speech checkpoints, for tests of everything around them: `tokenmill tiny --type vits`.

What they say is noise; how long it is depends on the text, how it sounds on voice and seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.progress import quiet

CHARACTERS = "abcdefghijklmnopqrstuvwxyzäöüéè '-.,!?"
UPSAMPLING = (8, 8)
"""Samples that the decoder makes of one frame: the product."""


def make_tiny_vits(
    folder: Path | str,
    *,
    layers: int = 1,
    hidden: int = 16,
    seed: int = 0,
    speakers: int = 1,
    **overrides: Any,
) -> Path:
    """Write a random VITS checkpoint of `speakers` voices into `folder` and return it; raises LoadError.

    `overrides` are fields of its config. The same arguments give the same weights.
    """
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: i for i, character in enumerate(["<pad>", *CHARACTERS])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = VitsModel(
                VitsConfig(**_fields(layers, hidden, speakers, len(vocabulary)) | overrides)
            )
            model.save_pretrained(folder)
            make: Any = VitsTokenizer
            make(folder / "vocab.json", phonemize=False, unk_token="<pad>").save_pretrained(folder)
    except Exception as error:  # sizes that don't fit each other fail in ways of the model's own
        raise LoadError(f"no tiny vits can be made ({first_line(error)})") from None
    return folder


def _fields(layers: int, hidden: int, speakers: int, vocab: int) -> dict[str, Any]:
    """A config of a few thousand weights."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "ffn_dim": 2 * hidden,
        "flow_size": hidden,
        "spectrogram_bins": 9,
        "upsample_initial_channel": 16,
        "upsample_rates": UPSAMPLING,
        "upsample_kernel_sizes": [2 * x for x in UPSAMPLING],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
        "prior_encoder_num_flows": 2,
        "prior_encoder_num_wavenet_layers": 1,
        "posterior_encoder_num_wavenet_layers": 1,
        "duration_predictor_filter_channels": hidden,
        "duration_predictor_num_flows": 1,
        "depth_separable_num_layers": 1,
        "num_speakers": speakers,
        "speaker_embedding_size": hidden if speakers > 1 else 0,
    }
