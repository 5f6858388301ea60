"""What a GPU check finds, one JSON line each, written at once: a process that dies takes nothing along.

begun, done      a part was started, and came to its end
figure, row      what it measured
failure          what was wrong
skipped          what there was no time for, or what this machine can't measure
limits           the machine's limits, as that process measured them
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmill.bench.gpu_speed import Figure
from tokenmill.bench.roofline import Limits


@dataclass(frozen=True, slots=True)
class Journal:
    """The file; several processes may add to it one after the other."""

    file: Path

    def note(self, kind: str, **fields: Any) -> None:
        """Add a line."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **fields}, default=str) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All of it; a last line that was cut off is left out."""
        if not self.file.exists():
            return []
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def begun(self) -> set[str]:
        """Names of the parts that were started."""
        return set(self._counted("begun"))

    def unfinished(self) -> list[str]:
        """Names of the parts that were started more often than they came to their end."""
        return sorted(self._counted("begun") - self._counted("done"))

    def _counted(self, kind: str) -> Counter[str]:
        return Counter(line["name"] for line in self.lines() if line["kind"] == kind)


@dataclass(slots=True)
class Findings:
    """A journal, sorted."""

    figures: list[tuple[str, Figure]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each part that came to its end."""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By section."""
    limits: list[Limits] = field(default_factory=list)
    """One of each process that measured them."""

    @classmethod
    def read(cls, journal: Journal) -> Findings:
        """What the journal's file holds."""
        found = cls()
        for line in journal.lines():
            match line.pop("kind"):
                case "figure":
                    found.figures.append((line.pop("model"), Figure(**line)))
                case "failure":
                    found.failures.append(line["what"])
                case "skipped":
                    found.skipped.append(line["name"])
                case "done":
                    found.seconds[line["name"]] = line["seconds"]
                case "row":
                    found.rows.setdefault(line.pop("section"), []).append(line)
                case "limits":
                    found.limits.append(Limits(**line))
        return found
