"""Where to end a text: stop strings, found even when they arrive in pieces."""

from collections.abc import Sequence

from rwkv_train.errors import ConfigError


class StopScanner:
    """Passes text through until the first stop string is complete.

    Text that may be the beginning of a stop string is held back until it is decided. So what comes out does
    not depend on how the text was cut into pieces, and no part of a stop string is ever shown.

    Example:
        >>> scanner = StopScanner(["END"])
        >>> scanner.feed("the E"), scanner.feed("ND of it"), scanner.stopped
        ('the ', '', True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            raise ValueError("stop must be a sequence of strings, not one string")
        if "" in stop:
            raise ConfigError("a stop string is empty; it must have one character at least")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    @property
    def held(self) -> str:
        """Text that was fed but has not come out; shorter than the longest stop string."""
        return self._held

    def feed(self, text: str) -> str:
        """Return what now certainly lies before any stop string; after the first one, always nothing."""
        if self.stopped:
            return ""
        self._held += text
        # The string that is complete first ends the text, as if it had come character by character.
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        if found:
            end, negative_length = min(found)
            self.stopped = True
            return self._release(end + negative_length, discard_rest=True)
        return self._release(len(self._held) - self._length_of_possible_beginning())

    def flush(self) -> str:
        """Return what is still held back: the text is over, so no stop string can follow."""
        return self._release(len(self._held))

    def _length_of_possible_beginning(self) -> int:
        longest = max(map(len, self._stop), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, length: int, discard_rest: bool = False) -> str:
        released, rest = self._held[:length], self._held[length:]
        self._held = "" if discard_rest else rest
        return released
