"""Calls of a model outside of training steps, by several processes that may need different numbers of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from rwkv_train.models.lm import LanguageModel, LmOutput
from rwkv_train.models.state import ModelState
from rwkv_train.parallel.processes import Processes


class ModelCalls:
    """A model that is called as often by every process.

    Where parameters are spread over the processes, each call gathers them from all. So before each call the
    processes tell each other that there is one, and who has none left calls with a token that nobody needs.

    Args:
        model: the model.
        processes: the processes of the run.
        together: whether calls have to be made together.
        beat: called after each call, as a sign of progress.
    """

    def __init__(
        self, model: LanguageModel, processes: Processes, *, together: bool, beat: Callable[[], None]
    ) -> None:
        self.config = model.config
        self._model = model
        self._processes = processes
        self._together = together and processes.world_size > 1
        self._beat = beat

    def as_model(self) -> LanguageModel:
        """Return this as what it stands in for: it has the config, parameters, states and call of a model."""
        return cast(LanguageModel, self)

    def __call__(self, *args: Any, **kwargs: Any) -> LmOutput:
        """Call the model, as soon as all processes are ready for a call."""
        if self._together:
            self._processes.any_of(True)
        output: LmOutput = self._model(*args, **kwargs)
        self._beat()
        return output

    def parameters(self) -> Iterator[Tensor]:
        """Return the model's parameters."""
        return iter(self._model.parameters())

    def zero_state(self, batch_size: int) -> ModelState:
        """Return the model's empty state."""
        return self._model.zero_state(batch_size)

    def initial_state(self, batch_size: int) -> ModelState:
        """Return the state that the model reads texts from."""
        return self._model.initial_state(batch_size)

    @contextmanager
    def finished_by_all(self) -> Iterator[None]:
        """Go on calling after the block, also after one that failed, until no process needs a call."""
        try:
            yield
        finally:
            if self._together:
                token = torch.zeros(1, 1, dtype=torch.int64, device=next(self.parameters()).device)
                while self._processes.any_of(False)[0]:
                    with torch.no_grad():
                        self._model(token)
