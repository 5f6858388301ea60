"""How much of a model each step reads, counted from its tensors as loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmill.engine.block_weight import Blocks
    from tokenmill.engine.config import Quantization


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Elements and bytes of the matrices that a token meets, experts apart; `expert_share` of them it meets."""

    weights: float
    weight_bytes: float
    expert_weights: float
    expert_bytes: float
    expert_share: float


BYTES = {"int8": 1.0, "fp8": 1.0, "fp8_dynamic": 1.0, "int4": 0.625}
"""Bytes of a rounded weight's element; 4 bits with the scale and minimum of 32."""


def in_words(parameters: int) -> str:
    """A number of parameters for people: 1.2B, 135M, 0.0231M."""
    millions = f"{parameters / 1e6:.3g}"
    return f"{parameters / 1e9:.1f}B" if float(millions) >= 1000 else f"{millions}M"


def size_of(
    module: Any,
    text_config: object,
    quantization: Quantization | None = None,
    blocks: dict[str, Blocks] | None = None,
) -> ModelSize:
    """The size of a causal LM. An embedding counts only where it is the output's too: it is looked up."""
    head = module.get_output_embeddings()
    held, unread = blocks or {}, _beside_text(module) | _looked_up(module, head)
    dense = experts = dense_bytes = expert_bytes = 0.0
    for name, weight in module.named_parameters():
        if weight.dim() < 2 or id(weight) in unread:
            continue
        size, width = weight.numel(), BYTES.get(str(quantization), weight.element_size())
        if name.endswith("_bias"):  # of all experts, a matrix that stays as it is
            width = weight.element_size()
        if head is not None and weight is head.weight and quantization in BYTES:
            width = 1.0 if weight.device.type == "cpu" else weight.element_size()
        taken = sum(x.nbytes for x in held[name].tensors) if name in held else size * width
        if ".experts." in name:
            experts, expert_bytes = experts + size, expert_bytes + taken
        else:
            dense, dense_bytes = dense + size, dense_bytes + taken
    return ModelSize(
        dense, dense_bytes, experts, expert_bytes, _expert_share(text_config) if experts else 1.0
    )


def text_part(module: Any) -> Any:
    """The body of a causal LM; of one that sees or hears, too, what reads text. None where it isn't called so."""
    inner = getattr(module, "model", None)
    return getattr(inner, "language_model", None) or getattr(inner, "text_model", None) or inner


def _beside_text(module: Any) -> set[int]:
    """Parameters, by identity, that text never goes through."""
    inner, part = getattr(module, "model", None), text_part(module)
    if part is None or part is inner or inner is None:
        return set()
    return {id(x) for x in inner.parameters()} - {id(x) for x in part.parameters()}


def _looked_up(module: Any, head: Any) -> set[int]:
    """Embeddings, by identity, of which a token reads a row."""
    tables = [part.weight for part in module.modules() if hasattr(part, "num_embeddings")]
    tables.append(module.get_input_embeddings().weight)
    return {id(table) for table in tables if head is None or head.weight is not table}


def _expert_share(config: object) -> float:
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        total = getattr(config, name, None)
        if chosen and total:
            return float(chosen / total)
    return 1.0
