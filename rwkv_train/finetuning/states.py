"""Learned starts of texts: the state, or vectors that are read before every text; the model itself stays as it is."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rwkv_train.config.methods import PrefixMethod
from rwkv_train.config.model import Rwkv4Config
from rwkv_train.errors import ConfigError, DataError
from rwkv_train.models.layers import at_least_float32
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.start import Start
from rwkv_train.models.state import LayerState, ModelState

START_LOG_WEIGHT = -5.0
"""Log of the weight that RWKV-4's learned mean begins with; a token has ``exp(key)``.

The empty state has weight 0 and so the gradient 0 to all that learns. This is the smallest weight that matters little:
beside a token with key 0 it moves the result by 0.7 %, which changed the loss of a small trained model by 0.0001, and
its gradient is as much smaller, which Adam evens out.
"""


def learn_state(model: LanguageModel) -> None:
    """Freeze a model and give it a start whose recurrent states learn: ``start.layers.N.*``.

    RWKV-5, 6 and 7 learn a matrix ``wkv`` ``[H, N, N]`` (value, key) for each layer, which begins with zeros: the
    model is what it was. RWKV-4 learns for each channel a ``mean`` of past values and its ``log_weight``, the
    numerator over the denominator and the log of the denominator; see :data:`START_LOG_WEIGHT`. The last inputs of
    the token shifts stay zero, as in official state tuning.

    Args:
        model: the model, with the weights that it will keep; its own parameters ask for no gradient any more.

    Source:
        RWKV-LM, ``RWKV-v5/src/model.py``, ``train_type`` "states".
    """
    model.requires_grad_(False)
    kind = _LearnedMean if isinstance(model.config, Rwkv4Config) else _LearnedMatrix
    model.start = LearnedState([kind(layer.wkv[0]) for layer in model.zero_state(1)])


def learn_prefix(
    model: LanguageModel, method: PrefixMethod, encode: Callable[[str], Sequence[int]], seed: int
) -> None:
    """Freeze a model and give it a start that reads learned vectors: ``start.embeddings`` ``[P, C]``.

    They are read as the embeddings of tokens are, from the empty state; the state after the last one is the start.

    Args:
        model: the model, with the weights that it will keep; its own parameters ask for no gradient any more.
        method: how many vectors, and the text with whose embeddings they begin.
        encode: text -> ids of tokens.
        seed: of the random tokens that they begin with where there is no text.

    Raises:
        ConfigError: the text has no tokens.
        DataError: a token of the text is beyond the model's vocabulary.
    """
    model.requires_grad_(False)
    rows = model.emb.weight[_first_tokens(method, encode, model.config.vocab_size, seed)]
    model.start = LearnedPrefix(at_least_float32(rows.detach()))


def export_start(model: LanguageModel, learned: Mapping[str, Tensor] | None = None) -> ModelState:
    """Return the state that a model reads texts from, ``[1, ...]`` on the CPU and without gradient.

    For :func:`~rwkv_train.models.state.save_state`; what was learned as a prefix is a state like any other here.

    Args:
        model: with a start.
        learned: the parameters of the start by their names in the model, where it has them rounded.
    """
    assert model.start is not None
    own = {
        name: (parameter if learned is None else learned[f"start.{name}"].to(parameter.device))
        for name, parameter in model.start.named_parameters()
    }
    was_training = model.training
    model.eval()  # no dropout while a prefix is read
    try:
        with torch.no_grad():
            state = functional_call(model.start, own, (model,))
    finally:
        model.train(was_training)
    return tuple(LayerState(*(x.detach().to("cpu", copy=True) for x in layer)) for layer in state)


class LearnedState(Start):
    """A state of which the recurrent part learns.

    Args:
        layers: for each layer a module that returns its state of the recurrence, without a batch.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, model: LanguageModel) -> ModelState:
        """Return the learned states, with zeros for the last inputs of the token shifts."""
        empty = model.zero_state(1)
        return tuple(
            layer._replace(wkv=learned().unsqueeze(0))
            for layer, learned in zip(empty, self.layers, strict=True)
        )


class LearnedPrefix(Start):
    """The state after vectors that stand before every text.

    Args:
        embeddings: what they begin with, ``[P, C]``.
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.clone())

    def forward(self, model: LanguageModel) -> ModelState:
        """Let the model's blocks read the vectors from the empty state."""
        x = self.embeddings.to(model.emb.weight.dtype).unsqueeze(0)
        return model.run_blocks(x, model.zero_state(1))[1]


class _LearnedMatrix(nn.Module):
    """The matrix state of a layer, beginning with the empty one ``[H, N, N]``."""

    def __init__(self, empty: Tensor) -> None:
        super().__init__()
        self.wkv = nn.Parameter(empty.clone())

    def forward(self) -> Tensor:
        return self.wkv


class _LearnedMean(nn.Module):
    """RWKV-4's state of a layer: a mean of past values, and the log of their weight; ``empty`` is ``[3, C]``."""

    def __init__(self, empty: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros_like(empty[0]))
        self.log_weight = nn.Parameter(torch.full_like(empty[0], START_LOG_WEIGHT))

    def forward(self) -> Tensor:
        return torch.stack((self.mean, torch.ones_like(self.mean), self.log_weight))


def _first_tokens(
    method: PrefixMethod, encode: Callable[[str], Sequence[int]], vocab_size: int, seed: int
) -> Tensor:
    if method.text is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, (method.n_tokens,), generator=generator)
    tokens = list(encode(method.text))
    if not tokens:
        raise ConfigError(
            f"finetune.text is {method.text!r}, of which the tokenizer makes no token; give it some text, or set it to "
            "null"
        )
    if max(tokens) >= vocab_size:
        raise DataError(
            f"token {max(tokens)} of finetune.text is beyond the model's vocabulary of {vocab_size}: this is not the "
            "model's tokenizer"
        )
    return torch.tensor((tokens * -(-method.n_tokens // len(tokens)))[: method.n_tokens])
