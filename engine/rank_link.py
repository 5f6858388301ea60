"""What crosses the socket between rank 0, which is the engine process, and each other rank of its model.

    rank 0                                        rank 1, 2, … (rank_host.py)
      Begin                                  ───▶
                                             ◀───  Loaded, or Failed at any time
      Meet, then a RankStep for every step   ───▶

Frames are those of messages.py. Tensors travel between the devices themselves (ranks.py).
"""

from __future__ import annotations

import socket
from contextlib import suppress

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.messages import HEADER, encode_frame

KINDS = (np.int64, np.int64, np.int64, np.int32, np.int32, np.int32, np.int64)


class RanksLost(RuntimeError):
    """The ranks are no longer in step with each other: only a new start helps."""


class NoRoom(MemoryError):
    """Some rank has no room for a KV cache. All of them know, and rank 0 says so."""


class Begin(msgspec.Struct, tag=True, array_like=True):
    """The first message: load this rank's part of a model, and meet the others at `rendezvous`, a file."""

    config: EngineConfig
    """With the rank's own device."""
    rank: int
    rendezvous: str


class Meet(msgspec.Struct, tag=True, array_like=True):
    """Every rank has its weights: meet the others now."""


class RankStep(msgspec.Struct, tag=True, array_like=True):
    """One forward pass of T tokens of R sequences, of which N rows of logits are wanted."""

    arrays: list[bytes]
    """`StepInputs.host`, whose types are `KINDS`."""
    decodes: int
    """Leading sequences of exactly one token."""
    carried: bool
    """Whether rank 0 sends the token ids anew: it has some on its device only."""
    copies: list[tuple[int, int]]
    """Blocks to copy afterwards: source, target."""

    def host_arrays(self) -> list[NDArray[np.int64] | NDArray[np.int32]]:
        """The arrays: ids [T], positions [T], slots [T], block table [R, P], lengths [R], starts [R + 1], rows [N]."""
        found = [np.frombuffer(raw, kind).copy() for raw, kind in zip(self.arrays, KINDS, strict=True)]
        found[3] = found[3].reshape(len(found[4]), -1)
        return found


class Loaded(msgspec.Struct, tag=True, array_like=True):
    """The rank has its weights and waits to be told to meet the others."""


class Failed(msgspec.Struct, tag=True, array_like=True):
    """The rank ends; the reason in one line."""

    reason: str


ToRank = Begin | Meet | RankStep
FromRank = Loaded | Failed
_decoder = msgspec.msgpack.Decoder(ToRank | FromRank)


class Link:
    """One end of the socket. Either end may be used by a thread that sends and another that receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")

    def fileno(self) -> int:
        """The socket's descriptor, for `select`."""
        return self._connection.fileno()

    def send(self, message: ToRank | FromRank) -> None:
        """Send a message; raises OSError when the other end is gone."""
        self._connection.sendall(encode_frame(message))

    def receive(self) -> ToRank | FromRank | None:
        """Wait for the next message; None when the other end is gone."""
        try:
            header = self._stream.read(HEADER.size)
            if len(header) < HEADER.size:
                return None
            (length,) = HEADER.unpack(header)
            payload = self._stream.read(length)
        except (OSError, ValueError):
            return None
        return _decoder.decode(payload) if len(payload) == length else None

    def shut(self) -> None:
        """End the connection: `receive` returns None at both ends."""
        with suppress(OSError):  # the other end was quicker
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        self._stream.close()
        self._connection.close()
