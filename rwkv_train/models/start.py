"""What a model reads every text from, where that is not the empty state."""

from typing import TYPE_CHECKING

from torch import nn

from rwkv_train.models.state import ModelState

if TYPE_CHECKING:
    from rwkv_train.models.lm import LanguageModel


class Start(nn.Module):
    """The state before a text, learned or given; ``LanguageModel.start`` holds it as a part of the model.

    Its parameters keep their own dtype where those of the model are cast for the forward.
    """

    def forward(self, model: "LanguageModel") -> ModelState:
        """Return the state before the first token of one text, ``[1, ...]``, with a gradient to what learns.

        Args:
            model: the model whose part this is, for whoever computes the state with it.
        """
        raise NotImplementedError


class FixedStart(Start):
    """A state that is what it is: read from a file, or left by another text.

    Args:
        state: of one text, ``[1, ...]``, of any dtypes and on any device.
    """

    def __init__(self, state: ModelState) -> None:
        super().__init__()
        self._state = state  # no buffers: the weights of a model with a start are those of one without

    def forward(self, model: "LanguageModel") -> ModelState:
        """Return the state."""
        return self._state
