"""Results that are dear to make and cheap to keep: the user's cache folder.

Every entry is named by a hash of all that it depends on, so nothing is ever stale, only unused. Entries
appear under their name in one step (write beside, then rename), so a reader or a second process sees a whole
entry or none. A cache that can't be written costs time, not service: writers report and go on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """`$TOKENMILL_CACHE`, else `tokenmill` in the user's cache folder (`$XDG_CACHE_HOME` or ~/.cache)."""
    own = os.environ.get("TOKENMILL_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tokenmill"


def key_of(*parts: object) -> str:
    """A file name for what depends on `parts` (anything whose `str` tells its value)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` of what `fill` puts into it, whole or not at all; raises OSError.

    When another process has made it meanwhile, theirs stays: both hold the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
    try:
        fill(beside)
        try:
            os.rename(beside, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
