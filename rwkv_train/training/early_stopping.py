"""When a run ends because the held-out loss falls no more."""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class EarlyStopping:
    """Counts validations without a better loss; what it knows is saved, so that a resumed run decides the same.

    Args:
        patience: how many in a row end the run; ``None``: no number does.
        held_out: what the validations measure, as JSON's types; ``None``: there are none.
        memory: what :meth:`to_json` gave when the checkpoint was saved; ``None`` from scratch. Losses on other text
            cannot be compared, so of those nothing is kept.
        unit: of the loss.
    """

    def __init__(
        self,
        patience: int | None,
        held_out: Mapping[str, object] | None = None,
        memory: Mapping[str, Any] | None = None,
        unit: str = "nats/token",
    ) -> None:
        self._unit = unit
        self._patience = patience
        self._held_out = held_out
        if not self.is_on_same_text(memory):
            if patience is not None:
                logger.info(
                    "validation is on other text than before, so the count for early stopping begins anew"
                )
            memory = None
        memory = memory or {}
        self._best: float | None = memory.get("best_loss")
        self._n_since: int = memory.get("validations_since", 0)

    def is_on_same_text(self, memory: Mapping[str, Any] | None) -> bool:
        """Say whether losses of the run that left this memory compare with those to come."""
        return (
            memory is None or memory.get("held_out", self._held_out) == self._held_out
        )  # older ones do not say

    def note(self, loss: float) -> None:
        """Take note of the loss of a validation."""
        if self._best is None or loss < self._best:
            self._best, self._n_since = loss, 0
        else:
            self._n_since += 1

    @property
    def reason(self) -> str | None:
        """Why the run ends here; ``None``: it goes on."""
        if self._patience is None or self._n_since < self._patience:
            return None
        return (
            f"{self._n_since} validations in a row were not below the loss of {self._best:.4f} {self._unit} "
            f"(trainer.early_stopping_patience is {self._patience})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what to remember as JSON's types."""
        return {"best_loss": self._best, "validations_since": self._n_since, "held_out": self._held_out}
