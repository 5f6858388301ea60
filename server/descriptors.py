"""The process's descriptors: the standard ones are open, and connections don't take the last of them.

    0 1 2 │ files, engines, connections, …     │ who asks /live │ no connection │
                                        limit - 48       limit - 32           limit

The kernel gives out the lowest descriptor that is free. So a new connection's own number says how many there can
still be, and nothing has to be counted.
"""

from __future__ import annotations

import enum
import os
import resource
import sys

STDIN, STDOUT, STDERR = 0, 1, 2
SPARE = 32
"""Kept for what isn't a connection: engines that are restarted, files that are read."""
PROBES = 16
"""Below those: for connections that get no answer but to `/live`."""


class Room(enum.Enum):
    """What a new connection can be given."""

    ANY = "any"
    PROBE = "probe"
    NONE = "none"


def open_standard() -> None:
    """Open the standard descriptors that the process was started without, to nowhere.

    Sockets would get their numbers otherwise, and what a library in C prints would be sent to a client.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python has None for those that it found closed.
    sys.stdin = sys.stdin or os.fdopen(STDIN, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(STDOUT, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(STDERR, "w", closefd=False)


def raise_limit() -> None:
    """Let the process have as many descriptors as it may: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS may have a hard limit above what it allows
            return


def room(descriptor: int) -> Room:
    """What a new connection with this descriptor can be given."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or descriptor < limit - SPARE - PROBES:
        return Room.ANY
    return Room.PROBE if descriptor < limit - SPARE else Room.NONE
