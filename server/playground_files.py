"""The files of the playground page and the paths they are served under."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "playground"
FILES = {
    "/": ("index.html", "text/html"),
    "/playground/style.css": ("style.css", "text/css"),
    "/playground/main.js": ("main.js", "text/javascript"),
    "/playground/request.js": ("request.js", "text/javascript"),
    "/playground/stream.js": ("stream.js", "text/javascript"),
    "/playground/view.js": ("view.js", "text/javascript"),
}
"""Path: file and media type."""
