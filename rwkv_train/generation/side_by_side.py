"""Many texts at once: each goes on from its own prompt, and all take their next token in one call of the model."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.errors import ConfigError
from rwkv_train.generation.generate import read_tokens
from rwkv_train.generation.sampling import SamplingSettings, count_token, sample
from rwkv_train.generation.stop import StopScanner
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.state import ModelState, join_rows, take_rows
from rwkv_train.tokenizers import StreamingDecoder, Tokenizer


class Prompt(NamedTuple):
    """A text to continue, and how."""

    tokens: list[int]
    """What the model reads first, one token at least; a new document begins with the end-of-document token."""
    settings: SamplingSettings
    max_tokens: int
    """The text ends after this many generated tokens at the latest."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these; also before an end-of-document token."""
    seed: int = 0
    """Of this text alone: what is generated beside it changes nothing."""


def generate_side_by_side(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Iterable[Prompt], *, batch_size: int
) -> Iterator[tuple[int, str]]:
    """Continue prompts; each gets the text that :func:`~rwkv_train.generation.generate.generate` gives it alone.

    A prompt is read by itself, in chunks; then its text takes a row of the batch until it ends, and the next prompt
    takes that row. Rounding differs with the rows beside it, so where two tokens are all but equally likely the
    choice may differ.

    Args:
        model: the model, on any device.
        tokenizer: the model's tokenizer.
        prompts: read as rows become free.
        batch_size: texts that are generated side by side.

    Yields:
        The position of a prompt in the input, and the text that follows it, as texts end.

    Raises:
        ConfigError: ``batch_size`` is below 1, or a stop string is empty.
        DataError: a prompt has tokens that the model has not.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    waiting = enumerate(prompts)
    rows: list[_Row] = []
    state = model.zero_state(0)
    while True:
        while len(rows) < batch_size and (entry := next(waiting, None)) is not None:
            index, prompt = entry
            row = _Row(index, prompt, tokenizer)
            logits, after = read_tokens(model, prompt.tokens, None)
            row.take_next(logits)
            if row.is_done:
                yield index, row.text
            else:
                rows.append(row)
                state = join_rows([state, after])
        if not rows:
            return

        batch_logits, state = _step(model, [row.token for row in rows], state)
        for row, logits in zip(rows, batch_logits, strict=True):
            row.take_next(logits)
        yield from ((row.index, row.text) for row in rows if row.is_done)
        going_on = [number for number, row in enumerate(rows) if not row.is_done]
        if len(going_on) < len(rows):
            rows = [rows[number] for number in going_on]
            state = take_rows(state, going_on)


@torch.no_grad()
def _step(model: LanguageModel, tokens: list[int], state: ModelState) -> tuple[Tensor, ModelState]:
    """Read one token in each row; return the predictions ``[B, V]`` float32 on the CPU and the new state."""
    device = next(model.parameters()).device
    output = model(torch.tensor(tokens, device=device).unsqueeze(1), state)
    assert output.logits is not None
    return output.logits[:, -1].to("cpu", torch.float32), output.state


class _Row:
    """One text while it is being made."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.index = index
        self.text = ""
        self.token = tokenizer.end_of_document
        """The token that was taken last."""
        self.is_done = prompt.max_tokens == 0
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._n_tokens = 0
        self._counts = torch.zeros(tokenizer.vocab_size)
        self._generator = torch.Generator().manual_seed(prompt.seed)
        self._scanner = StopScanner(prompt.stop)
        self._decoder = StreamingDecoder(tokenizer)

    def take_next(self, logits: Tensor) -> None:
        """Choose a token by the prediction ``[V]``, unless the text is complete."""
        if self.is_done:
            return
        settings, known = self._prompt.settings, logits[: self._tokenizer.vocab_size]
        self.token = sample(known, settings, self._generator, self._counts)
        if self.token == self._tokenizer.end_of_document:
            self._finish()
            return
        self._n_tokens += 1
        self._counts = count_token(self._counts, self.token, settings)
        self.text += self._scanner.feed(self._decoder.feed(self.token))
        if self._scanner.stopped:
            self.is_done = True
        elif self._n_tokens == self._prompt.max_tokens:
            self._finish()

    def _finish(self) -> None:
        self.text += self._scanner.feed(self._decoder.flush()) + self._scanner.flush()
        self.is_done = True
