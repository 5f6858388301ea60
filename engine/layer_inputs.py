"""What tokens bring to each layer by themselves, beside the stream that goes through all (Gemma 4 E2B and E4B).

    ids ─▶ table [V, L * P] ─▶ * scale ─┐
    embedded ─▶ project ─▶ norm of each P ─▶ + ─▶ [T, L * P]      once a step

    x ─▶ gate ─▶ act · its P ─▶ project ─▶ norm ─▶ + x            in each layer

The table is often half of a model, and a step reads one row a token: it stays where it is mapped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.engine import decoder_spec as spec
from tokenmill.engine.kernel_set import ReferenceKernels

NOTHING = torch.empty(0)


class LayerInputs:
    """ids [T], embedded [T, hidden] → all layers' inputs [T, L * P]. Takes the weights out of the description."""

    def __init__(self, inputs: spec.LayerInputs, kernels: ReferenceKernels) -> None:
        project, norm = inputs.project, inputs.norm
        self._look_up = kernels.make_embedding(inputs.table, None)
        self._scale = inputs.scale
        self._project = kernels.make_linear([project.weight], [project.bias], None)
        self._add = kernels.make_norm_add(norm.weight, norm.eps, norm.offset, inputs.out_scale)
        inputs.table = project.weight = NOTHING

    def __call__(self, ids: Tensor, embedded: Tensor) -> Tensor:
        return self._add(self._project(embedded, None), self._look_up(ids) * self._scale)


class LayerInput:
    """x [T, hidden] with what layer `index` makes of its input, times the layer's scale."""

    def __init__(self, part: spec.LayerInput, index: int, scale: float, kernels: ReferenceKernels) -> None:
        gate, project, norm = part.gate, part.project, part.norm
        self._kernels = kernels
        self._activation = part.activation
        self._start = index * gate.weight.shape[0]
        self._gate = kernels.make_linear([gate.weight], [gate.bias], None)
        self._project = kernels.make_linear([project.weight], [project.bias], None)
        self._add = kernels.make_norm_add(norm.weight, norm.eps, norm.offset, scale)
        gate.weight = project.weight = NOTHING

    def __call__(self, x: Tensor, inputs: Tensor) -> Tensor:
        own = self._kernels.act_mul(self._gate(x, None), inputs, self._start, self._activation)
        return self._add(self._project(own, None), x)
