"""Streaming generation: text in, pieces of text out as they are made, in constant memory."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from rwkv_train.errors import ConfigError, DataError
from rwkv_train.generation.sampling import SamplingSettings, count_token, sample
from rwkv_train.generation.stop import StopScanner
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.state import ModelState
from rwkv_train.tokenizers import StreamingDecoder, Tokenizer

PROMPT_CHUNK = 512
"""Tokens of a prompt that the model reads at once; more would need more memory and gain no speed."""

FinishReason = Literal["stop", "end_of_document", "max_tokens"]


class Generation(Iterator[str]):
    """The text that follows a prompt, piece by piece; :func:`generate` makes it.

    At any moment, also after an interruption, ``state`` and ``unread`` together stand for everything so far:
    the model has read up to ``state``, and ``unread`` is the text after that, the prompt's or its own. To go
    on, generate with this ``state`` from a prompt that begins with ``unread``.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompt: str,
        settings: SamplingSettings,
        *,
        max_tokens: int,
        seed: int,
        stop: Sequence[str],
        state: ModelState | None,
    ) -> None:
        self.n_tokens = 0
        """Tokens generated so far, those of a stop string included."""
        self.finish_reason: FinishReason | None = None
        """Why the text ended; None as long as it has not."""
        self._start = [tokenizer.end_of_document] if state is None else []
        if state is None:
            with torch.no_grad():
                state = model.initial_state(1)
        self._position = (state, prompt)
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_tokens = max_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._scanner = StopScanner(stop)
        self._decoder = StreamingDecoder(tokenizer)
        self._pieces = self._run()

    @property
    def state(self) -> ModelState:
        """State of the model, with a batch of one, before ``unread``."""
        return self._position[0]

    @property
    def unread(self) -> str:
        """Text after ``state`` that the model has not read; it contains no part of a stop string."""
        return self._position[1]

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        state, prompt = self._position
        tokens = self._start + self._tokenizer.encode(prompt)
        logits, state = read_tokens(self._model, tokens, state)
        self._position = (state, "")  # always one assignment: an interruption must not tear it
        n_known = self._tokenizer.vocab_size  # a model's padded vocabulary has ids without text above it
        counts = torch.zeros_like(logits[:n_known])
        while self.n_tokens < self._max_tokens:
            token = sample(logits[:n_known], self._settings, self._generator, counts)
            if token == self._tokenizer.end_of_document:
                yield from self._finish("end_of_document")
                return
            self.n_tokens += 1
            counts = count_token(counts, token, self._settings)
            yield from self._say(self._scanner.feed(self._decoder.feed(token)))
            if self._scanner.stopped:
                self.finish_reason = "stop"
                return
            if self.n_tokens < self._max_tokens:
                logits, state = read_tokens(self._model, [token], state)
                if not self._scanner.held and not self._decoder.pending:
                    self._position = (state, "")
        yield from self._finish("max_tokens")

    def _say(self, piece: str) -> Iterator[str]:
        if piece:
            self._position = (self.state, self.unread + piece)
            yield piece

    def _finish(self, reason: FinishReason) -> Iterator[str]:
        yield from self._say(self._scanner.feed(self._decoder.flush()) + self._scanner.flush())
        self.finish_reason = reason


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    *,
    max_tokens: int,
    seed: int,
    stop: Sequence[str] = (),
    state: ModelState | None = None,
) -> Generation:
    """Continue ``prompt``; the result yields pieces of text as they are made.

    Memory does not grow with the prompt or the text: the prompt is read in chunks of ``PROMPT_CHUNK`` tokens
    with a carried state, then one token at a time. A piece never ends within a character.

    Args:
        model: the model, on any device; the choice of tokens runs on the CPU, so that a seed means the same.
        tokenizer: the model's tokenizer.
        prompt: text to continue; may be empty without a ``state``, which starts a new document.
        settings: how tokens are chosen; penalties count generated tokens, not those of the prompt.
        max_tokens: the text ends after this many generated tokens at the latest.
        seed: the same seed gives the same text on the same machine.
        stop: the text ends before the first of these strings; also before an end-of-document token.
        state: state to go on from, with a batch of one; ``None``: a new document, so the model reads the
            end-of-document token first, as each document does in training and in ``eval-ppl``.

    Raises:
        ConfigError: ``max_tokens`` is below 0, or a stop string is empty.
        DataError: the prompt has tokens that the model has not.
        ValueError: a ``state``, but nothing to read after it.
    """
    if max_tokens < 0:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be 0 or more")
    if state is not None and not prompt:
        raise ValueError("to go on from a state, the prompt must have text for the model to read")
    return Generation(
        model, tokenizer, prompt, settings, max_tokens=max_tokens, seed=seed, stop=stop, state=state
    )


@torch.no_grad()  # not inference_mode: FSDP keeps what it gathers here for the training that goes on
def read_tokens(
    model: LanguageModel, tokens: Sequence[int], state: ModelState | None
) -> tuple[Tensor, ModelState]:
    """Let the model read ``tokens``, one at least, in chunks of ``PROMPT_CHUNK``.

    Args:
        model: the model, on any device.
        tokens: their ids.
        state: with a batch of one; ``None`` at the start of a text.

    Returns:
        The prediction after the last token, ``[V]`` float32 on the CPU, and the state after it.

    Raises:
        DataError: a token is beyond the model's vocabulary.
    """
    if max(tokens) >= model.config.vocab_size:
        raise DataError(
            f"token {max(tokens)} of the text is beyond the model's vocabulary of {model.config.vocab_size}: "
            "this is not the model's tokenizer"
        )
    device = next(model.parameters()).device
    for start in range(0, len(tokens), PROMPT_CHUNK):
        chunk = torch.tensor([tokens[start : start + PROMPT_CHUNK]], device=device)
        output = model(chunk, state)
        state = output.state
    return output.logits[0, -1].to("cpu", torch.float32), output.state
