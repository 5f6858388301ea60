"""Is a weight file what it says it is? Read from headers alone, before a byte of weights is touched.

safetensors   8 bytes: N   N bytes of JSON: {name: {dtype, shape, data_offsets}}   the data
GGUF          "GGUF" version counts   metadata   tensor table   (padding)   the data
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from tokenmill.engine.load_error import LoadError, first_line

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as a safetensors header names it; `dtype` is the format's own name (BF16, F32, …)."""

    dtype: str
    shape: tuple[int, ...]


def read_safetensors_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file; raises LoadError when header and file don't fit together."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            raise LoadError(f"{file.name} is truncated or no safetensors file ({size} bytes); fetch it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise LoadError(
                f"{file.name} has a header that is no JSON ({first_line(error)}); fetch it again"
            ) from None
    if not isinstance(header, dict):
        raise LoadError(f"{file.name} has a header that is no map; it is no safetensors file")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorEntry] = {}
    end = 0
    for name, fields in sorted(header.items(), key=_begin):
        entry, begin, stop = _entry(file, name, fields)
        if begin != end:
            raise LoadError(f"{file.name} is damaged: tensor {name} begins at byte {begin}, not at {end}")
        tensors[name], end = entry, stop
    if 8 + length + end != size:
        what = "is truncated" if 8 + length + end > size else "has bytes that no tensor owns"
        raise LoadError(
            f"{file.name} {what}: {8 + length + end} bytes by its header, {size} on disk; fetch it again"
        )
    return tensors


def _begin(item: tuple[str, Any]) -> tuple[int, int]:
    offsets = item[1].get("data_offsets") if isinstance(item[1], dict) else None
    whole = isinstance(offsets, list) and len(offsets) == 2 and all(type(x) is int for x in offsets)
    return (offsets[0], offsets[1]) if whole and offsets is not None else (-1, -1)


def _entry(file: Path, name: str, fields: Any) -> tuple[TensorEntry, int, int]:
    """A header's line checked against itself: does the shape fill the bytes between its offsets?"""
    begin, stop = _begin((name, fields))
    shape = fields.get("shape") if isinstance(fields, dict) else None
    dtype = fields.get("dtype") if isinstance(fields, dict) else None
    plain = isinstance(shape, list) and all(type(x) is int and x >= 0 for x in shape)
    if begin < 0 or stop < begin or not plain or shape is None or not isinstance(dtype, str):
        raise LoadError(f"{file.name} is damaged: its header's entry for {name} makes no sense")
    if dtype not in BITS:
        raise LoadError(f"{file.name} holds {name} in the unknown type {dtype}; a newer release may know it")
    if math.prod(shape) * BITS[dtype] != (stop - begin) * 8:
        raise LoadError(
            f"{file.name} is damaged: {name} is {dtype} {shape} by its header, but {stop - begin} bytes"
        )
    return TensorEntry(dtype, tuple(shape)), begin, stop


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file: the format's name of its type, its shape in torch's order, and where it lies."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GGUFSummary:
    """What a GGUF file holds: the architecture's name; F32, F16, BF16 or `packed` as its weights' type."""

    architecture: str
    stored: str
    tensors: tuple[GGUFTensor, ...]


def read_gguf_header(file: Path) -> GGUFSummary:
    """Walk a GGUF file's header; raises LoadError when the file is damaged or cut short."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        magic = stream.read(4)
        if magic != b"GGUF":
            raise LoadError(f"{file.name} is no GGUF file: it begins with {magic!r}; fetch it again")
        try:
            summary = _GGUFHeader(stream, size).read()
        except (ValueError, KeyError, ZeroDivisionError, struct.error) as error:
            raise LoadError(
                f"{file.name} is a corrupt GGUF file ({first_line(error)}); fetch it again"
            ) from None
    end = max(tensor.begin + tensor.bytes for tensor in summary.tensors)
    if end > size:
        raise LoadError(
            f"{file.name} is truncated: its tensors end at byte {end}, it has {size}; fetch it again"
        )
    return summary


class _GGUFHeader:
    """A walk over a GGUF header that keeps the tensors: names, types, sizes and places."""

    STRING, ARRAY = 8, 9
    PLAIN = ("BF16", "F16", "F32")
    SCALARS: ClassVar = {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = size

    def read(self) -> GGUFSummary:
        """What the header says."""

        version, tensors, pairs = self.unpack("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are known")
        metadata = {}
        for _ in range(pairs):
            key = self.string()
            metadata[key] = self.value(self.unpack("I")[0])
        if not tensors:
            raise ValueError("it holds no tensor")
        table = [self.tensor() for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        data = -(-self.stream.tell() // alignment) * alignment
        placed = tuple(replace(tensor, begin=data + tensor.begin) for tensor in table)
        kinds = {tensor.kind for tensor in table}
        stored = "packed" if kinds - set(self.PLAIN) else next(x for x in self.PLAIN if x in kinds)
        return GGUFSummary(str(metadata["general.architecture"]), stored, placed)

    def tensor(self) -> GGUFTensor:
        """One line of the tensor table; its place counts from where the data begins."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string()
        (dimensions,) = self.unpack("I")
        *shape, kind, offset = self.unpack(f"{self.bounded(dimensions, 8)}QIQ")
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"tensor {name:.60} has the unknown type {kind}")
        elements, width = GGML_QUANT_SIZES[kind]
        if shape and shape[0] % elements:
            raise ValueError(f"tensor {name:.60} has rows of {shape[0]}, no whole blocks of {elements}")
        size = math.prod(shape) // elements * width
        return GGUFTensor(name, GGMLQuantizationType(kind).name, tuple(reversed(shape)), offset, size)

    def bounded(self, count: int, width: int) -> int:
        """`count` things of `width` bytes each, if the file can hold them."""
        if count * width > self.size - self.stream.tell():
            raise ValueError(f"a count of {count} at byte {self.stream.tell()} runs past the end")
        return count

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self.stream.read(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return self.stream.read(self.bounded(length, 1)).decode("utf-8")

    def value(self, kind: int) -> Any:
        """One metadata value; arrays are passed over (None)."""
        if kind == self.STRING:
            return self.string()
        if kind != self.ARRAY:
            return self.unpack(self.SCALARS[kind])[0]
        element, count = self.unpack("IQ")
        if element == self.STRING:
            for _ in range(self.bounded(count, 8)):
                (length,) = self.unpack("Q")
                self.stream.seek(self.bounded(length, 1), 1)
        else:
            width = struct.calcsize("<" + self.SCALARS[element])
            self.stream.seek(self.bounded(count, width) * width, 1)
        return None
