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
from tokenmill.engine.describe import describe
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


def main() -> None:
    """Print the names of the kernels that one captured bucket after the other, and a mixed step, needs."""
    fields = SHAPES["Qwen3-0.6B"] | {"num_hidden_layers": 1, "vocab_size": WIDTH}
    module = build_module(fields, torch.device("cpu"), DTYPE, attention.NAME)
    layers = attention.probe_layers(module)
    with torch.inference_mode():
        described = to_meta(describe(module, layers, 512))
        with compiling_for(90) as compiled:
            kernels = GpuKernels(META, DTYPE)
            kernels.overlaps = True
            kernels.reserve(ROWS, WIDTH)
            decoder = Decoder(described, kernels)
            caches = kv_cache.allocate(layers, 4, 16, DTYPE, META).caches

            def step(tokens: Tensor, table: Tensor, lengths: Tensor, starts: Tensor, decodes: int) -> Any:
                plans = kernels.plan_attention(decodes)
                return AttentionMetadata(kernels, caches, tokens, table, lengths, starts, plans)

            def forward(tokens: Tensor, rows: StaticRows, out: Tensor) -> Tensor:
                n = len(tokens)
                lengths = rows["seq_lens"][:n]
                metadata = step(rows["slots"][:n], rows.table[:n], lengths, rows.query_start[: n + 1], n)
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
            mixed = step(zeros(100), table, lengths, zeros(6, dtype=torch.int32), 2)
            decoder(zeros(100), zeros(100), mixed, zeros(5))
    found = {"kernels": [kernel.name for kernel in compiled], "unrehearsed": unrehearsed}
    print(json.dumps(found | {"progress": graphs.progress}))


if __name__ == "__main__":
    main()
