"""Who is turned away: queues of a bounded length, and requests per minute and key."""

import time

from omniserve.server.errors import ApiError


class Queue:
    """Counts the sequences and prompt tokens under way. Invariant: both are 0 when nothing is open."""

    def __init__(self, sequences: int, tokens: int | None) -> None:
        self._most = sequences
        self._most_tokens = tokens
        self.sequences = 0
        self.tokens = 0
        self._ends: list[float] = []

    def fits(self, sequences: int) -> None:
        """Raise ApiError 400 for more sequences than can ever be queued."""
        if sequences > self._most:
            raise ApiError(
                400, f"{sequences} sequences (prompts x n): at most {self._most} can be queued; send fewer", param="n"
            )

    def full(self, sequences: int, tokens: int = 0) -> str | None:
        """Return why so much more finds no place, "reqs" or "tokens"; None if it does."""
        if self.sequences + sequences > self._most:
            return "reqs"
        if self._most_tokens is not None and self.tokens and self.tokens + tokens > self._most_tokens:
            return "tokens"
        return None

    def enter(self, tokens: int) -> None:
        """Count a sequence and the tokens of its prompt."""
        self.sequences += 1
        self.tokens += tokens

    def prefilled(self, tokens: int) -> None:
        """Count the tokens of a prompt no more."""
        self.tokens -= tokens

    def leave(self) -> None:
        """Count a sequence no more."""
        self.sequences -= 1
        self._ends.append(time.monotonic())
        if len(self._ends) > 64:
            del self._ends[:32]

    def seconds(self) -> float:
        """Guess how long it takes until a place is free, from how fast sequences have ended lately."""
        now = time.monotonic()
        recent = [end for end in self._ends if now - end < 30]
        return 30 / len(recent) if recent else 5.0


class Rates:
    """Requests per key and minute: a bucket that fills evenly and holds a minute's worth."""

    def __init__(self, per_minute: int) -> None:
        self._rate = per_minute / 60
        self._most = float(per_minute)
        self._left: dict[int, tuple[float, float]] = {}

    def take(self, key: int) -> None:
        """Count a request of a key, by its place in the list of keys. Raises ApiError 429 if it had its share."""
        if not self._rate:
            return
        now = time.monotonic()
        left, since = self._left.get(key, (self._most, now))
        left = min(self._most, left + (now - since) * self._rate)
        if left < 1:
            wait = (1 - left) / self._rate
            raise ApiError(
                429, f"this key may send {self._most:g} requests in a minute: wait {wait:.1f} s", retry_after=wait
            )
        self._left[key] = left - 1, now
