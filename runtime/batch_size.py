"""How many frames the network draws at once.

On a GPU a batch of frames takes less time than its frames one by one, up to a size that depends on the card and the network: small
batches leave multiprocessors idle, and beyond that size only memory and latency grow. :class:`BatchTuner` finds it while an
animation runs: it tries one size after the other on the animation's own first frames, so nothing is computed for the measuring alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from lp_edge.errors import ConfigError

__all__ = ["MAX_BATCH_SIZE", "BatchTuner", "candidates", "check_batch_size"]

MAX_BATCH_SIZE: Final = 64
"""Most frames that may be asked for."""

_LARGEST: Final = 16  # to try unasked: the first frames of a clip wait for it
# Calls of a new size that are not counted: the first prepares it, the second may record a CUDA graph.
_WARM: Final = 2
_COUNTED: Final = 3
# Sizes beyond the best one that are tried: a single one may be slow for its kernels, or by chance.
_PATIENCE: Final = 2
_WORTH: Final = 0.97  # of the time per frame: what a larger batch must come down to, to be worth its latency


def check_batch_size(size: int, bound: int = MAX_BATCH_SIZE, why: str = "") -> None:
    """Raise ConfigError for a batch size below 1 or above ``bound``."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= bound:
        raise ConfigError(
            f"batch size {size!r}",
            f"expected 1 to {bound}{why}",
            "choose a size in that range, or leave it out",
        )


def candidates(requested: int | None, resident: bool, max_batch: int | None) -> tuple[int, ...]:
    """Sizes to choose from.

    Args:
        requested: the size asked for; None = find one.
        resident: frames stay on a device; on a CPU batches are no faster than their frames.
        max_batch: what the network takes at most; None = no bound.

    Raises:
        ConfigError: the size asked for is out of range, or larger than the network takes.
    """
    bound = min(max_batch or MAX_BATCH_SIZE, MAX_BATCH_SIZE)
    if requested is not None:
        built = "" if max_batch is None or bound < max_batch else ", as its engine was built for"
        check_batch_size(requested, bound, built)
        return (requested,)
    if not resident:
        return (1,)
    return tuple(1 << power for power in range(_LARGEST.bit_length()) if 1 << power <= bound)


class BatchTuner:
    """Finds the smallest batch size that is about as fast a frame as any; not for use by several threads at once.

    Args:
        sizes: to choose from, growing.
        hurried: while it says so, frames are drawn one by one: others wait for the device.

    Example:
        >>> tuner = BatchTuner((1, 2, 4))
        >>> while tuner.chosen is None:
        ...     size = tuner.size
        ...     tuner.tell(size, {1: 10.0, 2: 12.0, 4: 24.0}[size])
        >>> tuner.chosen
        2
    """

    def __init__(self, sizes: Sequence[int], *, hurried: Callable[[], bool] = lambda: False) -> None:
        self._sizes, self._hurried = tuple(sizes), hurried
        self._at = 0
        self._calls: list[float] = []
        self._per_frame: dict[int, float] = {}
        self.chosen: int | None = self._sizes[0] if len(self._sizes) == 1 else None

    @property
    def size(self) -> int:
        """How many frames the next batch should have."""
        if self._hurried():
            return 1
        return self._sizes[self._at] if self.chosen is None else self.chosen

    @property
    def per_frame(self) -> dict[int, float]:
        """Size -> seconds a frame, of the sizes that were measured."""
        return dict(self._per_frame)

    def tell(self, size: int, seconds: float) -> None:
        """What a batch of :attr:`size` frames took from its beginning to its last pixel; other sizes, and hurried ones, are not counted."""
        if self.chosen is not None or size != self._sizes[self._at] or self._hurried():
            return
        self._calls.append(seconds)
        if len(self._calls) < _WARM + _COUNTED:
            return
        # The fastest: whatever else the machine does only adds.
        self._per_frame[size] = min(self._calls[_WARM:]) / size
        self._calls.clear()
        best = self._best()
        self._at += 1
        if self._at == len(self._sizes) or self._at > self._sizes.index(best) + _PATIENCE:
            self.chosen = best

    def _best(self) -> int:
        best, *larger = self._per_frame
        for size in larger:
            if self._per_frame[size] < _WORTH * self._per_frame[best]:
                best = size
        return best
