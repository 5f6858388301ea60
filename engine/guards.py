"""Which way of running a model is right? Asked before its weights are read.

    decoder     the fused decoder (decoder.py), where it gives what the model's own code gives
    paged       the model's own code, its attention through the paged cache
    sequential  the model's own code and cache, for what both of these get wrong

Names and flags answer first. Then a small float32 twin of the same config class, with one layer of each kind,
is run on the same random weights: by transformers' eager attention over whole texts, and by ours over chunks,
mixed batches and single tokens. The verdict is kept in the cache folder under all that it depends on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from tokenmill.engine import (
    attention,
    decoder,
    decoder_spec,
    describe,
    describe_experts,
    describe_gemma,
    describe_parts,
    describe_recurrent,
    fusion,
    kv_cache,
    layer_inputs,
    rope,
    shrink,
)
from tokenmill.engine.disk_cache import cache_root, key_of, write_file
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.load_error import first_line
from tokenmill.engine.progress import quiet
from tokenmill.kernels import recurrent, reference

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Forward = Callable[[Tensor, Tensor, attention.AttentionMetadata, Tensor | None], Tensor]
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
CARRYING_LAYERS = {"linear_attention", "conv", "mamba"}
"""Those whose state only the fused decoder can keep for several sequences."""
TOLERANCE = 1e-4  # of the largest logit
HIDDEN, VOCAB, BLOCK = 64, 128, 4
LENGTHS = (23, 14, 6)
STEPS = (  # tokens that each of the three texts advances by in a step: chunks, a mixed batch, decodes
    (7, 0, 0),
    (9, 5, 0),
    (1, 6, 4),
    (1, 1, 1),
    (5, 2, 1),
)
NAMES = {
    "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures",
    "quantization_config",
}  # fmt: skip
"""Config fields that say nothing of what a model computes."""


class Verdict(msgspec.Struct, frozen=True):
    """What the twin showed.

    `refusal`: why the type can't run in the paged cache, None if it can; `fusible`: whether its sibling
    linears may be fused; `decoder`: how the fused decoder must pair the dimensions that RoPE turns to be
    right, None if it isn't right in either way; `carries`: whether nothing but the fused decoder is.
    """

    refusal: str | None
    fusible: bool = False
    decoder: Literal["halves", "interleaved"] | None = None
    carries: bool = False


def check(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Verdict:
    """What is safe with this type and config."""
    text_config = config.get_text_config(decoder=True)
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if strange := sorted(kinds - KNOWN_LAYERS - CARRYING_LAYERS):
        return Verdict(f"it has {strange[0]} layers")
    if not kinds & CARRYING_LAYERS and not model_class.is_backend_compatible():  # type: ignore[no-untyped-call]
        return Verdict("it has an attention of its own")
    fields = twin_fields(config)
    carrying = next(iter(sorted(kinds & CARRYING_LAYERS)), None)
    return _kept(fields) or _keep(fields, judge(model_class, fields, carrying))


def twin_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of the small twin's config."""
    fields = shrink.shrink(config.to_dict(), layers=2, hidden=HIDDEN, vocab=VOCAB, grouped=False)
    return {k: v for k, v in fields.items() if k not in NAMES and not k.startswith("_")}


def judge(model_class: type[PreTrainedModel], fields: dict[str, Any], carrying: str | None) -> Verdict:
    """Build the twins and compare them: eager, ours, ours with fused linears, the fused decoder.

    `carrying` is a kind of its layers that the model's own code can't run for several sequences at once.
    """
    attention.register()
    texts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    with quiet(), torch.no_grad():
        try:
            eager = _twin(model_class, fields, "eager")
            wanted = [eager(input_ids=text[None], use_cache=False).logits[0] for text in texts]
        except Exception as error:  # a twin is a guess at sizes that fit each other
            return Verdict(f"no small twin of it runs: {first_line(error)}")
        if carrying is not None:
            return _judge_carrying(
                partial(_twin, model_class, fields, attention.NAME), texts, wanted, carrying
            )
        try:
            ours = _twin(model_class, fields, attention.NAME)
            layers = attention.probe_layers(ours)
            paged = relative_error(run_paged(partial(attention.forward, ours), layers, texts), wanted)
        except Exception as failure:  # whatever an unsuitable forward does with our arguments
            return Verdict(f"{type(failure).__name__}: {first_line(failure)}")
        if not paged <= TOLERANCE:
            return Verdict(f"its logits differ from eager attention's by {paged:.1e}")
        decoder = _decoder_form(partial(_twin, model_class, fields, attention.NAME), texts, wanted)
        try:
            fusion.fuse_siblings(ours)
            fused = relative_error(run_paged(partial(attention.forward, ours), layers, texts), wanted)
        except Exception:  # code that can't take a slice of a wider output: it runs unfused
            return Verdict(None, False, decoder)
    return Verdict(None, fused <= TOLERANCE, decoder)


def _judge_carrying(
    make: Callable[[], PreTrainedModel], texts: list[Tensor], wanted: list[Tensor], kind: str
) -> Verdict:
    """Whether the fused decoder is right for a model with `kind` layers; nothing else is."""
    refusal = f"it has {kind} layers"
    try:
        form = _decoder_form(make, texts, wanted)
    except Exception as failure:  # whatever an unsuitable forward does with our arguments
        return Verdict(f"{refusal}; {first_line(failure)}")
    return Verdict(refusal if form is None else None, decoder=form, carries=form is not None)


def _decoder_form(
    make: Callable[[], PreTrainedModel], texts: list[Tensor], wanted: list[Tensor]
) -> Literal["halves", "interleaved"] | None:
    """The form in which the fused decoder gives the wanted logits."""
    forms: tuple[Literal["halves", "interleaved"], ...] = ("halves", "interleaved")
    for form in forms:
        module = make()
        layers = attention.probe_layers(module)
        try:
            described = describe.describe(module, layers, shrink.CONTEXT, form == "interleaved")
        except Exception:  # NotUnderstood, or what a part of an unknown kind makes of being asked
            return None
        kept = describe.kept_by(described)
        found = run_paged(decoder.Decoder(described, ReferenceKernels()), kept, texts)
        if relative_error(found, wanted) <= TOLERANCE:
            return form
    return None


def _twin(model_class: type[PreTrainedModel], fields: dict[str, Any], implementation: str) -> PreTrainedModel:
    config_class: Any = model_class.config_class
    build: Any = model_class._from_config
    config = config_class.from_dict(json.loads(json.dumps(fields)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = build(config, attn_implementation=implementation, dtype=torch.float32)
    shrink.randomize(model, 0)
    rope.pin_rope(model, shrink.CONTEXT)
    nn.Module.train(model, False)
    return model


def run_paged(forward: Forward, layers: Sequence[attention.Kept], texts: list[Tensor]) -> list[Tensor]:
    """Logits [tokens, V] of each text [tokens], computed by `forward` in `STEPS` through a paged cache."""
    width = -(-max(LENGTHS) // BLOCK)
    cache = kv_cache.allocate(
        layers, width * len(texts), BLOCK, torch.float32, torch.device("cpu"), sequences=len(texts)
    )
    # Interleaved, so that a row's blocks are no run of neighbours; block 0 belongs to nobody.
    tables = torch.arange(1, 1 + width * len(texts), dtype=torch.int32).reshape(width, len(texts)).T
    done = [0] * len(texts)
    parts: list[list[Tensor]] = [[] for _ in texts]
    for step in STEPS:
        rows = [i for i, count in enumerate(step) if count]
        spans = [torch.arange(done[i], done[i] + step[i]) for i in rows]
        metadata = attention.AttentionMetadata(
            kernels=reference,
            caches=cache.caches,
            slots=torch.cat([_slots(tables[i], s) for i, s in zip(rows, spans, strict=True)]),
            block_table=tables[rows],
            seq_lens=torch.tensor([done[i] + step[i] for i in rows], dtype=torch.int32),
            query_start=torch.tensor([0, *accumulate(step[i] for i in rows)], dtype=torch.int32),
            lines=torch.tensor(rows),
        )
        ids = torch.cat([texts[i][s] for i, s in zip(rows, spans, strict=True)])
        logits = forward(ids, torch.cat(spans), metadata, None)
        for i, part in zip(rows, torch.split(logits, [step[i] for i in rows]), strict=True):
            parts[i].append(part)
            done[i] += step[i]
    return [torch.cat(part) for part in parts]


def _slots(table: Tensor, positions: Tensor) -> Tensor:
    return table[positions // BLOCK].long() * BLOCK + positions % BLOCK


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, as a share of the largest wanted value; NaN where any logit is."""
    difference = torch.cat([(a - b).abs().flatten() for a, b in zip(found, wanted, strict=True)])
    return float(difference.max() / torch.cat([x.abs().flatten() for x in wanted]).max())


def _file(fields: dict[str, Any]) -> Path:
    """Where the verdict on a twin is kept: it depends on the twin, the libraries and our own attention."""
    modules = (
        attention, decoder, decoder_spec, describe, describe_experts, describe_gemma, describe_parts,
        describe_recurrent, fusion, layer_inputs, recurrent, reference, rope, shrink,
    )  # fmt: skip
    code = [Path(str(module.__file__)).read_bytes() for module in modules]
    twin = json.dumps(fields, sort_keys=True, default=str)
    key = key_of(twin, version("transformers"), torch.__version__, Path(__file__).read_bytes(), *code)
    return cache_root() / "guards" / f"{key}.json"


def _kept(fields: dict[str, Any]) -> Verdict | None:
    try:
        return msgspec.json.decode(_file(fields).read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError):
        return None


def _keep(fields: dict[str, Any], verdict: Verdict) -> Verdict:
    try:
        write_file(_file(fields), msgspec.json.encode(verdict))
    except OSError:
        return verdict  # the check runs again at the next start
    return verdict
