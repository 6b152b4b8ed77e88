"""A conversation: turns in the template of RWKV's chat models, with a state that is kept between them."""

import re
from collections.abc import Generator, Sequence
from pathlib import Path

from rwkv_train.checkpoints.states import require_state_of
from rwkv_train.errors import ConfigError
from rwkv_train.generation.generate import Generation, read_tokens
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.state import LayerState, load_state, save_state
from rwkv_train.tokenizers import Tokenizer

TURN_SEPARATOR = "\n\n"
TURN = "User: {message}\n\nAssistant:"
"""The template of the published chat models: the answer follows it, then the separator and the next turn."""
CHAT_STOP = ("\n\nUser:",)
"""Where an answer ends: the model begins to write the user's next turn."""


class ChatSession:
    """A conversation that can go on for ever: all it remembers is a state of constant size.

    Args:
        model: the model, on any device.
        tokenizer: the model's tokenizer.
        settings: how tokens are chosen; penalties count the tokens of one answer.
        max_tokens: longest answer, in tokens.
        seed: the same seed and messages give the same conversation on the same machine.
        stop: an answer ends before the first of these strings, or with an end-of-document token.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        settings: SamplingSettings,
        *,
        max_tokens: int,
        seed: int,
        stop: Sequence[str] = CHAT_STOP,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_tokens = max_tokens
        self._seed = seed
        self._stop = stop
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.n_turns = 0
        _, self._state = read_tokens(self._model, [self._tokenizer.end_of_document], None)
        self._unread = ""  # the end of the conversation, which the state does not hold yet

    def reply(self, message: str) -> Generator[str, None, None]:
        """Answer ``message``, in pieces as they are made.

        The turn counts as it stands when the iterator is left, so an answer may be interrupted anywhere:
        the model will remember what it had said by then.
        """
        turn = TURN.format(message=re.sub(r"\n{2,}", "\n", message.strip()))
        # A model that was trained on chats may end an answer with the separator and the end of the document.
        before = self._unread.removesuffix(TURN_SEPARATOR) + TURN_SEPARATOR if self.n_turns else ""
        generation = Generation(
            self._model,
            self._tokenizer,
            before + turn,
            self._settings,
            max_tokens=self._max_tokens,
            seed=self._seed + self.n_turns,
            stop=self._stop,
            state=self._state,
        )
        self.n_turns += 1
        try:
            yield from generation
        finally:
            self._state, self._unread = generation.state, generation.unread

    def save(self, path: Path) -> None:
        """Write the conversation's state.

        Raises:
            ConfigError: nothing was said yet.
            CheckpointError: the file cannot be written.
        """
        if not self.n_turns:
            raise ConfigError("there is no conversation to save yet")
        if self._unread:
            _, self._state = read_tokens(self._model, self._tokenizer.encode(self._unread), self._state)
            self._unread = ""
        save_state(path, self._state)

    def load(self, path: Path) -> None:
        """Go on with a conversation that :meth:`save` wrote.

        Raises:
            CheckpointError: the file cannot be read, or is of a model of other sizes.
        """
        state = load_state(path)
        wanted = self._model.zero_state(1)
        require_state_of(path, state, wanted)
        self._state = tuple(
            LayerState(*(x.to(like) for x, like in zip(layer, layer_like, strict=True)))
            for layer, layer_like in zip(state, wanted, strict=True)
        )
        self._unread = ""
        self.n_turns = 1
