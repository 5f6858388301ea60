"""A step's kernels as one call: recorded once, run with each step's sizes and tables.

    tape = Tape(torch.bfloat16)
    x = tape.rows(head)                      values have a number and a width; memory is assigned by `seal`
    x = tape.linear(down, x, residual=x)
    tape.seal(x)
    logits = tape.run(ids, positions, slots, block_table, seq_lens, query_start, logits_index)

What runs are the functions of elementwise.py, linear.py and attention.py, in the order in which they were
recorded, so the results are the same bits as theirs. What is saved is Python between them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.cpu.elementwise import check_columns, check_groups
from tokenmill.kernels.cpu.library import ACTIVATIONS, TYPES, check, required
from tokenmill.kernels.cpu.linear import FLOAT32, PackedLinear
from tokenmill.kernels.cpu.mixture import Chooser, PackedMixture
from tokenmill.kernels.cpu.recurrent import PackedConv, PackedNorm, PackedRule
from tokenmill.kernels.cpu.tape_structs import MAX_BUFFERS, AttentionStruct, OpStruct, RopeStruct, StepStruct

TILE_ROWS = TILE_COLUMNS = 32
KINDS = (
    "rows",
    "gather",
    "pick",
    "linear",
    "rms_norm",
    "layer_norm",
    "rope_store",
    "attend",
    "activate",
    "scale_add",
    "join",
    "gate",
    "gate_add",
    "norm_whole",
    "mixture",
    "conv",
    "recur",
    "gated_norm",
    "gate_mul",
    "norm_add",
    "act_mul",
)
ROWS, GATHER, PICK, LINEAR, RMS_NORM, LAYER_NORM, ROPE_STORE, ATTEND, ACTIVATE, SCALE_ADD, *_REST = range(
    len(KINDS)
)
JOIN, GATE, GATE_ADD, NORM_WHOLE, MIXTURE, CONV, RECUR, GATED_NORM, GATE_MUL, NORM_ADD, ACT_MUL = _REST


@dataclass(frozen=True, slots=True)
class Value:
    """What an operation brings: [tokens, width], or [picked rows, width] after `pick`; `wide`: in float32."""

    number: int
    width: int
    picked: bool
    wide: bool = False


class Tape:
    """Operations on values of one element type, bfloat16 or float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._type = TYPES[dtype]
        self._values: list[Value] = []
        self._ops: list[OpStruct] = []
        self._names: list[str] = []
        self._spent: ctypes.Array[c_int64] | None = None
        self._carries = False
        """Whether some layer carries a state, so that steps must say whose."""
        self.narrows = False
        """Whether some layer attends with the picked rows alone, so that steps must say where these are."""
        self._held: list[object] = []
        """Tensors and structures that operations point to."""
        self._result: Value | None = None
        self._sealed: ctypes.Array[OpStruct] | None = None
        self._widths: list[int] = []
        self._memory: list[Tensor] = []

    # ---------------------------------------------------------------- recording

    def rows(self, packed: PackedLinear) -> Value:
        """The step's ids looked up in a packed weight (a tied embedding)."""
        return self._record(ROWS, packed.in_features, job=packed.address, held=packed)

    def gather(self, table: Tensor) -> Value:
        """The step's ids looked up in a plain table [V, width]."""
        check(table, "table", tuple(table.shape), self.dtype)
        return self._record(GATHER, table.shape[1], job=table.data_ptr(), held=table)

    def pick(self, x: Value) -> Value:
        """Rows `logits_index` of x."""
        return self._record(PICK, x.width, x, picked=True)

    def linear(
        self, packed: PackedLinear, x: Value, residual: Value | None = None, *, wide: bool = False
    ) -> Value:
        """As PackedLinear's call; `wide`: the result is float32 in any case."""
        if packed.in_features != x.width:
            raise ValueError(f"a product over {packed.in_features} inputs can't take rows of {x.width}")
        value = self._record(
            LINEAR, packed.out_features, x, residual, wide=wide, job=packed.address, held=packed
        )
        self._ops[-1].input_tiled = packed.struct.format != FLOAT32
        return value

    def rms_norm(self, x: Value, weight: Tensor, eps: float, offset: float = 0.0) -> Value:
        check(weight, "weight", (x.width,), self.dtype)
        return self._record(RMS_NORM, x.width, x, job=weight.data_ptr(), held=weight, eps=eps, factor=offset)

    def norm_add(
        self, x: Value, weight: Tensor, eps: float, offset: float, residual: Value, scale: float = 1.0
    ) -> Value:
        """As elementwise.norm_add."""
        size = check_groups(x.width, weight, self.dtype)
        return self._record(
            *(NORM_ADD, x.width, x, residual),
            eps=eps,
            factor=offset,
            scale=scale,
            left=size,
            job=weight.data_ptr(),
            held=weight,
        )

    def act_mul(self, x: Value, other: Value, start: int, activation: str) -> Value:
        """As elementwise.act_mul."""
        check_columns(start, x.width, other.width)
        if x.picked != other.picked:
            raise ValueError("factors must have the rows of what they multiply")
        return self._record(
            *(ACT_MUL, x.width, x, None, other),
            activation=ACTIVATIONS[activation],
            left=start,
            middle=other.width,
        )

    def layer_norm(self, x: Value, weight: Tensor, bias: Tensor | None, eps: float) -> Value:
        check(weight, "weight", (x.width,), self.dtype)
        if bias is not None:
            check(bias, "bias", (x.width,), self.dtype)
            self._held.append(bias)
        address = None if bias is None else bias.data_ptr()
        return self._record(
            LAYER_NORM, x.width, x, job=weight.data_ptr(), held=weight, eps=eps, second=address
        )

    def norm_whole(self, qkv: Value, q_weight: Tensor, k_weight: Tensor, eps: float, offset: float) -> Value:
        """As elementwise.norm_whole."""
        query, key = q_weight.numel(), k_weight.numel()
        check(q_weight, "q_weight", (query,), self.dtype)
        check(k_weight, "k_weight", (key,), self.dtype)
        if query + key > qkv.width:
            raise ValueError(f"rows of {qkv.width} don't hold {query} of queries and {key} of keys")
        return self._record(
            *(NORM_WHOLE, qkv.width, qkv),
            eps=eps,
            factor=offset,
            left=query,
            middle=key,
            job=q_weight.data_ptr(),
            second=k_weight.data_ptr(),
            held=(q_weight, k_weight),
        )

    def activate(self, x: Value, activation: str) -> Value:
        return self._record(ACTIVATE, x.width, x, activation=ACTIVATIONS[activation])

    def join(self, x: Value, other: Value) -> Value:
        """[x | other]: each row of x with the other's behind it."""
        return self._record(JOIN, x.width + other.width, x, other, left=x.width)

    def activation_mul(self, x: Value, activation: str) -> Value:
        """act(gate) * up of rows [gate | up]."""
        return self._record(GATE, x.width // 2, x, activation=ACTIVATIONS[activation])

    def gate_add(self, x: Value, gate: Value, residual: Value | None = None) -> Value:
        """As elementwise.gate_add."""
        return self._record(GATE_ADD, x.width, x, residual, gate)

    def mixture(
        self, packed: PackedMixture, chooser: Chooser, x: Value, logits: Value, residual: Value | None = None
    ) -> Value:
        """As PackedMixture's call, over what `chooser` makes of the router logits."""
        if packed.in_features != x.width or chooser.experts != logits.width or not logits.wide or x.picked:
            raise ValueError("rows or router logits aren't those of the mixture")
        return self._record(
            *(MIXTURE, packed.out_features, x, residual, logits),
            job=packed.address,
            second=chooser.address,
            held=(packed, chooser),
        )

    def conv(self, packed: PackedConv, x: Value, state: Tensor) -> Value:
        """As PackedConv's call, for the step's sequences."""
        packed.check_state(state, self.dtype)
        job = packed.struct(x.width)
        return self._carry(CONV, packed.channels, x, None, job, packed, state)

    def recur(self, packed: PackedRule, x: Value, gates: Value, state: Tensor) -> Value:
        """As PackedRule's call, for the step's sequences."""
        packed.check_state(state)
        if x.width != packed.width or gates.width != packed.gates or not gates.wide:
            raise ValueError(f"rows of {x.width} under {gates.width} gates aren't the rule's")
        return self._carry(RECUR, packed.out_features, x, gates, packed.struct, packed, state)

    def _carry(
        self,
        kind: int,
        width: int,
        x: Value,
        other: Value | None,
        job: ctypes.Structure,
        packed: object,
        state: Tensor,
    ) -> Value:
        if x.picked:
            raise ValueError("states go on over all of a step's tokens")
        self._carries = True
        return self._record(
            *(kind, width, x, None, other),
            job=ctypes.addressof(job),
            second=state.data_ptr(),
            held=(packed, state),
        )

    def gated_norm(self, packed: PackedNorm, x: Value, gate: Value) -> Value:
        """As PackedNorm's call."""
        packed.check_width(x.width, gate.width)
        return self._record(
            *(GATED_NORM, x.width, x, None, gate),
            job=ctypes.addressof(packed.struct),
            left=gate.width,
            held=packed,
        )

    def gate_mul(self, x: Value, gate: Value) -> Value:
        """As recurrent.gate_mul."""
        if x.width != gate.width:
            raise ValueError(f"rows of {x.width} can't be gated by {gate.width}")
        return self._record(GATE_MUL, x.width, x, None, gate)

    def scale_add(self, x: Value, scale: float, residual: Value | None = None) -> Value:
        """scale * x (+ residual)."""
        return self._record(SCALE_ADD, x.width, x, residual, factor=scale)

    def rope_store(
        self,
        qkv: Value,
        cos: Tensor | None,
        sin: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        heads: int,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 1e-6,
        norm_offset: float = 0.0,
        interleaved: bool = False,
        value_norm: bool = False,
        stores: bool = True,
    ) -> Value:
        """As elementwise.rope_store, the tables read at the step's positions: queries [tokens, heads * D]."""
        _, kv_heads, block_size, size = k_cache.shape
        kv_heads, value_size = kv_heads if stores else 0, v_cache.shape[3]
        if stores and qkv.picked:
            raise ValueError("keys and values are stored of all tokens")
        if qkv.width != (heads + kv_heads) * size + kv_heads * value_size:
            raise ValueError(f"rows of {qkv.width} don't hold {heads} queries and {kv_heads} keys and values")
        job = RopeStruct(
            cos=_address(cos),
            sin=_address(sin),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            q_norm=_address(q_weight),
            k_norm=_address(k_weight),
            heads=heads,
            kv_heads=kv_heads,
            size=size,
            value_size=value_size,
            half=0 if cos is None else cos.shape[1],
            block_size=block_size,
            eps=eps,
            offset=norm_offset,
            interleaved=interleaved,
            value_norm=value_norm,
            type=self._type,
        )
        self._held += [cos, sin, k_cache, v_cache, q_weight, k_weight]
        return self._record(ROPE_STORE, heads * size, qkv, job=ctypes.addressof(job), held=job)

    def attend(
        self,
        query: Value,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Value:
        """As attention.paged_attention: [tokens, heads * E]."""
        _, kv_heads, block_size, key_size = k_cache.shape
        heads, value_size = query.width // key_size, v_cache.shape[3]
        wide = None if sinks is None else sinks.float().contiguous()
        job = AttentionStruct(
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            sinks=_address(wide),
            heads=heads,
            kv_heads=kv_heads,
            block_size=block_size,
            key_size=key_size,
            value_size=value_size,
            window=max(window, 0),
            scale=scale,
            softcap=softcap,
            type=self._type,
        )
        self._held += [k_cache, v_cache, wide]
        self.narrows |= query.picked
        return self._record(ATTEND, heads * value_size, query, job=ctypes.addressof(job), held=job)

    def _record(
        self,
        kind: int,
        width: int,
        x: Value | None = None,
        residual: Value | None = None,
        other: Value | None = None,
        *,
        picked: bool = False,
        wide: bool = False,
        activation: int = 0,
        eps: float = 0.0,
        factor: float = 0.0,
        scale: float = 1.0,
        job: int | None = None,
        second: int | None = None,
        left: int = 0,
        middle: int = 0,
        held: object = None,
    ) -> Value:
        if self._sealed is not None:
            raise ValueError("the tape is sealed")
        beside = left if kind == JOIN else 0
        if residual is not None and (
            residual.width + beside != width or x is None or residual.picked != x.picked
        ):
            raise ValueError("a residual must have the result's shape")
        value = Value(len(self._values), width, picked or (x is not None and x.picked), wide)
        numbers = [-1 if each is None else each.number for each in (x, residual, other)]
        op = OpStruct(
            *(kind, *numbers, value.number, value.picked, activation, False, False, wide),
            *(eps, factor, scale, width, left, middle, job, second),
        )
        self._values.append(value)
        self._ops.append(op)
        self._names.append(f"linear {x.width}→{width}" if kind == LINEAR and x is not None else KINDS[kind])
        self._held.append(held)
        return value

    # ---------------------------------------------------------------- memory

    def seal(self, result: Value) -> None:
        """End the recording; `result`, the last value, is what `run` returns.

        Values that never live together share a buffer; the result has one of its own, given anew by each `run`.
        """
        if result.number != len(self._ops) - 1:
            raise ValueError("the result must be what the last operation brings")
        self._result = result
        self._choose_layouts()
        last_use = {result.number: len(self._ops)}
        for place, op in reversed(list(enumerate(self._ops))):
            for number in (op.input, op.residual, op.other):
                if number >= 0:
                    last_use.setdefault(number, place)
        buffer_of: dict[int, int] = {}
        free: list[int] = []
        size = self.dtype.itemsize
        for place, op in enumerate(self._ops):
            # An operation never writes where it reads: only what was used up before it is free.
            value = self._values[op.output]
            own = not free or value is self._values[-1]
            buffer = len(self._widths) if own else free.pop()
            if buffer == len(self._widths):
                self._widths.append(0)
            self._widths[buffer] = max(
                self._widths[buffer], value.width * (4 if value.wide else size) // size
            )
            buffer_of[op.output] = buffer
            read = {n for n in (op.input, op.residual, op.other) if n >= 0}
            ended = {n for n in read if last_use.get(n) == place}
            free += [buffer_of[number] for number in ended]
        if len(self._widths) > MAX_BUFFERS:
            raise ValueError(f"the tape needs {len(self._widths)} buffers, {MAX_BUFFERS} are to be had")
        for op in self._ops:
            op.input, op.residual, op.other = (
                buffer_of.get(n, -1) for n in (op.input, op.residual, op.other)
            )
            op.output = buffer_of[op.output]
        self._sealed = (OpStruct * len(self._ops))(*self._ops)

    def _choose_layouts(self) -> None:
        """Where steps bring many rows, what only products read lies as they take it (src/tiled.h)."""
        read = {op.input for op in self._ops}
        otherwise = {op.input for op in self._ops if not op.input_tiled}
        otherwise |= {number for op in self._ops for number in (op.residual, op.other)}
        for op in self._ops:
            op.tiled = (
                op.kind in (LINEAR, RMS_NORM, ATTEND)
                and op.output in read - otherwise
                and op.size % TILE_COLUMNS == 0
                and self.dtype == torch.bfloat16
            )
        tiled = {op.output for op in self._ops if op.tiled}
        for op in self._ops:
            op.input_tiled = op.input in tiled

    # ---------------------------------------------------------------- running

    def watch(self) -> None:
        """From now on each `run` adds up what its operations take."""
        self._spent = (c_int64 * len(self._ops))()

    def spent(self) -> dict[str, float]:
        """Seconds since `watch`, by kind of operation; products apart by their sizes."""
        seconds: dict[str, float] = {}
        for name, nanoseconds in zip(self._names, self._spent or (), strict=False):
            seconds[name] = seconds.get(name, 0.0) + nanoseconds / 1e9
        return seconds

    def _buffers(self, tokens: int) -> list[Tensor]:
        if not self._memory or self._memory[0].shape[0] < tokens:
            rows = -(-tokens // TILE_ROWS) * TILE_ROWS
            self._memory = [torch.empty(rows, width, dtype=self.dtype) for width in self._widths]
        return self._memory

    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        logits_index: Tensor,
        lines: Tensor | None = None,
        alone: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One step: `ids`, `positions`, `slots` [T] int64, `block_table` [R, P], `seq_lens` [R], `query_start`
        [R + 1] int32, `logits_index` [N] int64, where layers carry states `lines` [R] int64, and where the tape
        `narrows` the positions, table, lengths and query starts of the picked rows as N sequences. Returns the
        sealed value's rows, a tensor of its own."""
        if self._sealed is None or self._result is None:
            raise ValueError("the tape isn't sealed")
        tokens, sequences, picked = ids.shape[0], seq_lens.shape[0], logits_index.shape[0]
        for name, tensor in (("ids", ids), ("positions", positions), ("slots", slots)):
            check(tensor, name, (tokens,), torch.int64)
        check(logits_index, "logits_index", (picked,), torch.int64)
        check(block_table, "block_table", (sequences, block_table.shape[1]), torch.int32)
        check(seq_lens, "seq_lens", (sequences,), torch.int32)
        check(query_start, "query_start", (sequences + 1,), torch.int32)
        if lines is not None:
            check(lines, "lines", (sequences,), torch.int64)
        elif self._carries:
            raise ValueError("the step doesn't say whose states it continues")
        if alone is not None:
            places, table, lengths, starts = alone
            check(places, "positions alone", (picked,), torch.int64)
            check(table, "table alone", (picked, block_table.shape[1]), torch.int32)
            check(lengths, "lengths alone", (picked,), torch.int32)
            check(starts, "starts alone", (picked + 1,), torch.int32)
        elif self.narrows:
            raise ValueError("the step doesn't say where the rows with logits are")
        rows = picked if self._result.picked else tokens
        result = torch.empty(rows, self._result.width, dtype=self.dtype)
        step = StepStruct(
            tokens=tokens,
            sequences=sequences,
            table_width=block_table.shape[1],
            picked=picked,
            ids=ids.data_ptr(),
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            logits_index=logits_index.data_ptr(),
            block_table=block_table.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            query_start=query_start.data_ptr(),
            lines=_address(lines),
            type=self._type,
        )
        if alone is not None:
            step.picked_positions, step.picked_table, step.picked_lens, step.picked_start = (
                part.data_ptr() for part in alone
            )
        for number, memory in enumerate(self._buffers(max(tokens, picked))):
            step.buffers[number] = memory.data_ptr()
        step.buffers[self._sealed[-1].output] = result.data_ptr()
        required().tm_run_tape(self._sealed, len(self._sealed), ctypes.byref(step), self._spent)
        return result


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
