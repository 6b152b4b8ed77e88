"""The results of a campaign on disk, written after each case, so that it goes on where it was stopped."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rwkv_train.benchmarks.environment import describe_environment

logger = logging.getLogger(__name__)

Row = dict[str, Any]
AS_PROMISED = "as promised"


class Record:
    """The rows of a campaign's JSON file.

    Args:
        path: the file; what is in it is kept.
        command: how the campaign was started.
        key: name of the value that tells rows apart.
        total: sums the rows up.
    """

    def __init__(self, path: Path, command: str, key: str, total: Callable[[list[Row]], Row]) -> None:
        self.path = path
        self._key = key
        self._total = total
        self._lock = threading.Lock()
        self.environment = {**describe_environment(torch.device("cpu")), "command": command}
        self.rows: list[Row] = []
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["results"]
            logger.info("%s holds %d cases; going on with those that are missing", path, len(self.rows))

    def has(self, key: Any) -> bool:
        """Tell whether a case is there already."""
        return any(row[self._key] == key for row in self.rows)

    def add(self, row: Row) -> None:
        """Add a case and write the file."""
        with self._lock:
            self.rows.append({**row, "commit": self.environment["commit"]})
            self.rows.sort(key=lambda one: one[self._key])
            content = {
                "environment": self.environment,
                "totals": self.totals,
                "results": self.rows,
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            new.replace(self.path)
        logger.info("%s %s: %s", self._key, row[self._key], row["outcome"])

    @property
    def totals(self) -> Row:
        """The rows, summed up."""
        return self._total(self.rows)

    @property
    def is_as_promised(self) -> bool:
        """Whether no case was otherwise."""
        return all(row["outcome"] == AS_PROMISED for row in self.rows)


def outcome(problems: list[str]) -> str:
    """Return what a row says of its case."""
    return "; ".join(problems) or AS_PROMISED
