"""Times of the stages of a run."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stopwatch"]

_SAMPLES = 1 << 16


class Stopwatch:
    """Collects how long each stage took, per frame; safe to use from several threads.

    Only the newest 65 536 samples of a stage are kept, so that memory does not grow with a stream.

    Example:
        >>> watch = Stopwatch()
        >>> with watch("warp"):
        ...     pass
        >>> len(watch.seconds["warp"])
        1
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.seconds: dict[str, deque[float]] = {}

    @contextmanager
    def __call__(self, stage: str, count: int = 1) -> Iterator[None]:
        """Time the body as ``count`` samples of ``stage``, each its share of the seconds: work on several frames at once."""
        start = time.perf_counter()
        try:
            yield
        finally:
            share = (time.perf_counter() - start) / count
            for _ in range(count):
                self.add(stage, share)

    def add(self, stage: str, seconds: float) -> None:
        """Add one sample."""
        with self._lock:
            self.seconds.setdefault(stage, deque(maxlen=_SAMPLES)).append(seconds)
