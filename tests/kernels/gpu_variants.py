"""How many variants of each kernel mixed steps need, when their numbers of rows and where those begin change.

Run as a program by test_gpu_compile.py. The tensors are a CPU's, since those of the meta device have no addresses;
nothing is launched.
"""

from __future__ import annotations

import json
from collections import Counter

import torch
from torch import Tensor

from tokenmill.kernels import gpu
from tokenmill.kernels.gpu import jit
from tokenmill.kernels.gpu.offline import compiling_for
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rule

HEADS, KV_HEADS, SIZE = 8, 2, 64


def carry(lines: Tensor, lengths: Tensor, starts: Tensor, tokens: int) -> None:
    """A layer that carries a state."""
    heads = torch.zeros(HEADS)
    rule = Rule(KV_HEADS, HEADS, SIZE, SIZE, heads, heads, delta=True)
    x, states = torch.zeros(tokens, rule.width, dtype=torch.bfloat16), torch.zeros(9, HEADS, SIZE, SIZE)
    inputs = torch.zeros(9, 3, rule.width, dtype=torch.bfloat16)
    rows = lines, lengths, starts
    gpu.causal_conv(x, Conv(torch.zeros(4, rule.width), None, "silu"), inputs, rows)
    read = gpu.recur(x, torch.zeros(tokens, 2 * HEADS), rule, states, rows)
    gpu.gated_norm(read, x, GatedNorm(torch.zeros(SIZE), 1e-6, SIZE))
    gpu.gate_mul(read, read)


def main() -> None:
    """Print the number of compiled variants by kernel."""
    jit.INTERPRETED = True  # as far as the check of devices goes: the kernels were made for a GPU
    cache = torch.zeros(4, KV_HEADS, 16, SIZE, dtype=torch.bfloat16)
    with compiling_for(90) as compiled:
        for decodes in range(6):
            for prompts in (1, 3):
                rows = decodes + prompts
                query = torch.zeros(decodes + 8 * prompts, HEADS, SIZE, dtype=torch.bfloat16)
                table, lengths = torch.zeros(rows, 3, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
                starts = torch.zeros(rows + 1, dtype=torch.int32)
                carry(torch.arange(rows + decodes)[decodes:], lengths, starts, len(query))
                gpu.paged_attention(query, cache, cache, table, lengths, starts, scale=0.1, decodes=decodes)
    print(json.dumps(Counter(kernel.name for kernel in compiled)))


if __name__ == "__main__":
    main()
