"""Small random checkpoints of any causal-LM type, with a working tokenizer: `tokenmill tiny`.

(Of speech checkpoints too: `tiny_speech.py`.)

The config is the type's own default with its sizes shrunk by name; layers of each kind that the type mixes
are kept, and windows are short enough for a test to cross them. Weights are drawn so that greedy text varies
and depends on the whole prompt. The tokenizer is a byte-level BPE, so any text goes round.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.model_class import causal_lm_class, is_causal_lm
from tokenmill.engine.progress import quiet
from tokenmill.engine.shrink import CONTEXT, randomize, shrink
from tokenmill.engine.tiny_speech import make_tiny_vits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import TokenizersBackend as Fast

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|tool|>")
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = """
The mill stands by the river, and the river turns the wheel. Every morning the miller opens the gate, and
the water begins to run; every evening the gate is closed, and the stones are still. What is ground in the
mill? Wheat and rye, oats and barley, 12 sacks on Monday, 7 on Tuesday, 340 in a good year. "Is the flour
fine?" asks the baker. "It's as fine as the stones allow," the miller says, "and that's fine enough."
def grind(sacks: list[int], stones: int = 2) -> dict[str, int]:
    return {"flour": sum(sacks) // stones, "bran": sum(sacks) % stones}
Die Mühle steht am Bach; le moulin est près de la rivière; el molino está junto al río. 水車 στο ποτάμι 🌾
"""


def make_tiny(
    model_type: str,
    folder: Path | str,
    *,
    layers: int = 2,
    hidden: int = 64,
    vocab: int = 320,
    seed: int = 0,
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of `model_type` into `folder` and return it; raises LoadError.

    `vocab` counts the tokenizer's ids, at least 256 bytes and the special ones. `overrides` are fields of the
    text config and win over the shrunk ones. The same arguments give the same weights.
    """
    folder = Path(folder)
    tokenizer = make_tokenizer(vocab)
    overrides = {**SPECIAL_IDS, **overrides}
    with quiet():
        config = tiny_config(model_type, layers, hidden, len(tokenizer), overrides)
        model_class, own = causal_lm_class(config)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = model_class(own)
        except Exception as error:  # a type may want sizes that fit each other in a way of its own
            raise LoadError(f"no tiny {model_type} can be made ({first_line(error)})") from None
        randomize(model, seed)
        folder.mkdir(parents=True, exist_ok=True)
        model.generation_config = _generation_config()
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        if not is_causal_lm(own):  # known only as the text part of a larger config
            config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def tiny_config(
    model_type: str, layers: int, hidden: int, vocab: int, overrides: dict[str, Any]
) -> PreTrainedConfig:
    """The type's default config made small; `overrides` go into its text config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise LoadError(f"model type {model_type!r} is unknown to this transformers")
    try:
        config_class = CONFIG_MAPPING[model_type]
        fields = shrink(config_class().to_dict(), layers=layers, hidden=hidden, vocab=vocab, grouped=True)
        target = fields.get("text_config", fields)
        if "tie_word_embeddings" in target:  # a tied random model would repeat its last token for ever
            target["tie_word_embeddings"] = False
        if "is_decoder" in target:  # what was made for reading both ways completes text only as a decoder
            target["is_decoder"] = True
        target.update(overrides)
        config: PreTrainedConfig = config_class.from_dict(fields)
    except Exception as error:  # config classes check what they are given, each in its own way
        raise LoadError(f"no tiny config of type {model_type} can be made ({first_line(error)})") from None
    return config


def make_tokenizer(size: int = 320) -> Fast:
    """A byte-level BPE of `size` ids trained on a few lines: any text encodes, and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if size < 256 + len(SPECIAL):
        raise LoadError(f"vocab must be at least {256 + len(SPECIAL)}: 256 bytes and the special tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS.splitlines(), trainer)
    bos = SPECIAL[1]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, SPECIAL.index(bos))]
    )
    fast: Any = PreTrainedTokenizerFast
    tokenizer: Fast = fast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        bos_token=bos,
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[2],  # else some types' tokenizer classes add one of their own, beyond the embedding
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _generation_config() -> Any:
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    return make(**{**SPECIAL_IDS, "eos_token_id": [2, SPECIAL.index("<|im_end|>")]})


def main(argv: list[str] | None = None) -> int:
    """`tokenmill tiny --type TYPE --out DIR`: write a checkpoint, say what it is. Returns an exit status."""
    parser = argparse.ArgumentParser(prog="tokenmill tiny", description="Write a small random checkpoint.")
    parser.add_argument(
        "--type", required=True, help="a causal-LM type of transformers, such as qwen3, or vits"
    )
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64, help="hidden size, a multiple of 8")
    parser.add_argument("--vocab", type=int, help="ids of the tokenizer (default 320; vits has letters)")
    parser.add_argument("--voices", type=int, help="voices of a vits (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args(argv)
    try:
        _make(options)
    except LoadError as error:
        parser.exit(1, f"tokenmill tiny: {error}\n")
    except OSError as error:
        parser.exit(1, f"tokenmill tiny: {options.out} can't be written ({error.strerror})\n")
    print(f"{options.out}: a random {options.type} of {options.layers} layers, {options.dtype}")
    return 0


def _make(options: argparse.Namespace) -> None:
    """Write what the command line asks for. Raises LoadError, for options that its type hasn't too."""
    shape = {"layers": options.layers, "hidden": options.hidden, "seed": options.seed}
    if options.type == "vits":
        if options.vocab is not None or options.dtype != "float32":
            raise LoadError("a vits reads letters and runs in float32: leave --vocab and --dtype out")
        make_tiny_vits(options.out, speakers=options.voices or 1, **shape)
        return
    if options.voices is not None:
        raise LoadError(f"--voices is for vits; a {options.type} has none")
    make_tiny(options.type, options.out, vocab=options.vocab or 320, dtype=options.dtype, **shape)
