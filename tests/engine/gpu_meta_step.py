"""A decode step and a mixed step on the meta device, its kernels compiled for an H200 that isn't there.

Run as a program by test_gpu_step.py, since Triton's interpreter can't be left again. Tensors without storage can't
be read: whatever in a step asked the device for a number would raise here, as it would break a captured graph.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from tokenmill.bench.gpu_models import SHAPES, build_module
from tokenmill.engine import attention, kv_cache
from tokenmill.engine.attention import AttentionMetadata
from tokenmill.engine.cuda_graph import DecodeGraphs, StaticRows, record
from tokenmill.engine.decoder import Decoder
from tokenmill.engine.describe import describe, kept_by
from tokenmill.engine.gpu_kernels import GpuKernels
from tokenmill.kernels.gpu.offline import META, compiling_for

ROWS, WIDTH, DTYPE = 72, 2048, torch.bfloat16


def to_meta(value: Any) -> Any:
    """The same structure with tensors of shapes alone."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=META)
    if isinstance(value, list):
        return [to_meta(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            setattr(value, field.name, to_meta(getattr(value, field.name)))
    return value


class MetaRows(StaticRows):
    """Static rows whose host side isn't copied anywhere: there is nowhere."""

    def fill(self, bucket: int, arrays: dict[str, Any]) -> None:
        pass


ATTENDING = SHAPES["Qwen3-0.6B"] | {"num_hidden_layers": 1, "vocab_size": WIDTH}
CARRYING = {
    "model_type": "qwen3_5_text", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "vocab_size": WIDTH, "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}  # fmt: skip


def compile_steps(fields: dict[str, Any]) -> tuple[list[str], list[str], float]:
    """Kernels that one captured bucket after the other, and a mixed step, needs; those not rehearsed; progress."""
    module = build_module(fields, torch.device("cpu"), DTYPE, attention.NAME)
    layers = attention.probe_layers(module)
    with torch.inference_mode():
        described = to_meta(describe(module, layers, 512))
        kept = kept_by(described)
        with compiling_for(90) as compiled:
            kernels = GpuKernels(META, DTYPE)
            kernels.overlaps = True
            kernels.reserve(ROWS, WIDTH)
            decoder = Decoder(described, kernels)
            caches = kv_cache.allocate(kept, 4, 16, DTYPE, META, sequences=ROWS).caches

            def step(
                tokens: Tensor, table: Tensor, lengths: Tensor, starts: Tensor, decodes: int, lines: Tensor
            ) -> Any:
                plans = kernels.plan_attention(decodes)
                return AttentionMetadata(kernels, caches, tokens, table, lengths, starts, plans, lines)

            def forward(tokens: Tensor, rows: StaticRows, out: Tensor) -> Tensor:
                n = len(tokens)
                lengths = rows["seq_lens"][:n]
                starts, lines = rows.query_start[: n + 1], rows["rows"][:n]
                metadata = step(rows["slots"][:n], rows.table[:n], lengths, starts, n, lines)
                return decoder(tokens, rows["positions"][:n], metadata, None, out)

            def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=META)

            counts = zeros(ROWS, WIDTH, dtype=torch.int32), zeros(ROWS, WIDTH, dtype=torch.bool)
            graphs = DecodeGraphs(
                kernels,
                forward,
                MetaRows(ROWS, 8, META),
                zeros(ROWS, WIDTH, dtype=DTYPE),
                zeros(ROWS + 1),
                counts,
                record,
                [ROWS, 16, 1],
            )
            with kernels.overlapping():
                graphs.rehearse()
                rehearsed = len(compiled)
                while graphs.capture_next():
                    pass
            unrehearsed = [kernel.name for kernel in compiled[rehearsed:]]
            table, lengths = zeros(5, 8, dtype=torch.int32), zeros(5, dtype=torch.int32)
            mixed = step(zeros(100), table, lengths, zeros(6, dtype=torch.int32), 2, zeros(5))
            decoder(zeros(100), zeros(100), mixed, zeros(5))
    return [kernel.name for kernel in compiled], unrehearsed, graphs.progress


def main() -> None:
    """Print what the steps of a model that attends and of one that carries states need, together."""
    attending, carrying = compile_steps(ATTENDING), compile_steps(CARRYING)
    found = {"kernels": attending[0] + carrying[0], "unrehearsed": attending[1] + carrying[1]}
    print(json.dumps(found | {"progress": min(attending[2], carrying[2])}))


if __name__ == "__main__":
    main()
