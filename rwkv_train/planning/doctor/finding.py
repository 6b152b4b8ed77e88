"""What the doctor says of one thing it looked at."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "absent", "warning", "error"]
"""``"ok"``; ``"absent"``: not there and not needed; ``"warning"``: training runs, but not as it could; ``"error"``:
training cannot run before it is repaired."""


class Finding(NamedTuple):
    """One row of the report."""

    id: str
    """Name of the thing; it stays the same from version to version."""
    status: Status
    found: str
    """What is there, in one or two sentences."""
    remedy: str | None = None
    """What to do; every warning and error has one."""
    facts: Mapping[str, Any] = {}
    """The same for machines, as JSON's types."""

    def to_json(self) -> dict[str, Any]:
        """Return all but the id, under which it is filed."""
        return {
            "status": self.status,
            "found": self.found,
            "remedy": self.remedy,
            "facts": dict(self.facts),
        }


def gib(n_bytes: int) -> str:
    """Write a number of bytes for a person."""
    return f"{n_bytes / 2**30:.1f} GiB"


def split_remedy(message: str) -> tuple[str, str | None]:
    """Split the sentence of one of our errors, which says what to do after its last semicolon, or not at all."""
    what, semicolon, remedy = " ".join(message.split()).rpartition("; ")
    return (what, remedy) if semicolon else (remedy, None)
