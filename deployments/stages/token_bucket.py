"""A token bucket: allows a short burst, and after it one event per interval."""

import time
from collections.abc import Callable


class TokenBucket:
    """Full at first. burst: the most tokens that it holds. clock: in seconds."""

    def __init__(self, burst: int, clock: Callable[[], float] = time.monotonic):
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock()

    def take(self, every_s: float = 1.0) -> bool:
        """Takes a token; False if there is none. every_s: seconds in which one is added, for the time since the last call."""
        self._fill(every_s)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def due_in_s(self, every_s: float = 1.0) -> float:
        """Seconds until there is a token to take."""
        self._fill(every_s)
        return max(0.0, (1 - self._tokens) * every_s)

    def _fill(self, every_s: float) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) / every_s)
        self._filled_at = now
