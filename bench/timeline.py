"""When one request's tokens came, and the latencies that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Timeline:
    """One request; times are `time.perf_counter`."""

    began: float
    prompt_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    """When each token came; of an answer over HTTP, each event that carried output."""

    @property
    def first(self) -> float:
        """Seconds from the request to the first token (TTFT)."""
        return self.arrivals[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring arrivals (ITL)."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def whole(self) -> float:
        """Seconds from the request to the last token."""
        return self.arrivals[-1] - self.began
