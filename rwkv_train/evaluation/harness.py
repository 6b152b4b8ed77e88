r"""A model of ours in EleutherAI's lm-evaluation-harness; it is registered there as ``rwkv-train``.

Needs the extra ``rwkv-train[lm-eval]``. The harness finds no models of other packages by itself, so import this
module first. From the harness' own command line::

    python -c "import rwkv_train.evaluation.harness, lm_eval.__main__ as harness; harness.cli_evaluate()" \
        run --model rwkv-train --model_args pretrained=PATH,prefix=newline --device auto --tasks lambada_openai

What is read before a text is a choice (:class:`~rwkv_train.evaluation.prefix.Prefix`) and moves every number a
little; the default is an end-of-document token before every request.

Source:
    Interface and conventions: EleutherAI, ``lm-evaluation-harness``, ``lm_eval/api/model.py`` (0.4.13).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  # its own models, which it would not look for once ours is registered
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from rwkv_train.checkpoints import load_model
from rwkv_train.checkpoints.tensors import DTYPES
from rwkv_train.checkpoints.tokenizer import choose_tokenizer
from rwkv_train.errors import BackendError, ConfigError
from rwkv_train.evaluation import scoring
from rwkv_train.evaluation.gen_kwargs import parse_gen_kwargs
from rwkv_train.evaluation.lambada import continuation
from rwkv_train.evaluation.prefix import Prefix, prefix_tokens
from rwkv_train.generation.side_by_side import Prompt, generate_side_by_side
from rwkv_train.models.lm import LanguageModel
from rwkv_train.tokenizers import Tokenizer

_LOAD_ARGUMENTS = ("pretrained", "tokenizer", "prefix", "dtype", "device", "batch_size", "chunk_len")


@register_model("rwkv-train")
class RwkvTrainLM(LM):  # type: ignore[misc]  # the harness has no types
    """What the harness asks of a model.

    Args:
        model: the model, on any device.
        tokenizer: the model's tokenizer.
        prefix: what the model reads before each request.
        batch_size: requests that are read or continued side by side.
        chunk_len: tokens of each that are read at once. The context has no limit and nothing is cut off.
        seed: of texts that are drawn at random; each request has its own stream of random numbers.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        prefix: Prefix = Prefix.END_OF_DOCUMENT,
        batch_size: int = scoring.BATCH_SIZE,
        chunk_len: int = scoring.CHUNK_LEN,
        seed: int = 0,
    ) -> None:
        super().__init__()
        scoring.require_sizes(batch_size=batch_size, chunk_len=chunk_len)
        # Not named `tokenizer`: the harness takes that for one of transformers'.
        self._model, self._text_tokenizer = model, tokenizer
        self._prefix = prefix
        self._batch_size, self._chunk_len = batch_size, chunk_len
        self._seed = seed
        self._device = next(model.parameters()).device

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "RwkvTrainLM":
        """Load what the harness' ``--model_args`` name; see :meth:`create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "RwkvTrainLM":
        """Load a checkpoint.

        Args:
            arg_dict: ``pretrained``, a checkpoint as for ``eval-ppl``; and, if wanted, ``tokenizer``, ``prefix``,
                ``dtype`` (``fp32``, ``bf16``, ``fp16``), ``device``, ``batch_size``, ``chunk_len``.
            additional_config: the same, from options of the harness, which ``arg_dict`` goes before; ``None`` stands
                for an absent one.

        Raises:
            ConfigError: an argument is unknown or has no such value.
            BackendError: there is no such device.
            CheckpointError: the checkpoint cannot be read.
            DataError: the tokenizer is not the model's.
        """
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        given = options | arg_dict  # the harness sets a batch size and a device even where the user did not
        unknown = sorted(set(given) - set(_LOAD_ARGUMENTS))
        if unknown or "pretrained" not in given:
            problem = f"has no argument '{unknown[0]}'" if unknown else "needs the argument 'pretrained'"
            raise ConfigError(f"the model rwkv-train {problem}; it takes {', '.join(_LOAD_ARGUMENTS)}")
        prefix = _one_of(given, "prefix", {each.value: each for each in Prefix}, Prefix.END_OF_DOCUMENT)
        dtype = _one_of(given, "dtype", DTYPES, torch.float32)
        batch_size = _number(given, "batch_size", scoring.BATCH_SIZE)
        chunk_len = _number(given, "chunk_len", scoring.CHUNK_LEN)
        device = _device(given.get("device", "auto"))
        model, weights = load_model(str(given["pretrained"]), device=device, dtype=dtype)
        tokenizer = choose_tokenizer(weights, given.get("tokenizer"))
        return cls(model, tokenizer, prefix=prefix, batch_size=batch_size, chunk_len=chunk_len)

    @property
    def tokenizer_name(self) -> str:
        """Name and hash of the tokenizer, by which the harness tells its caches of requests apart."""
        identity = self._text_tokenizer.identity
        return f"{identity.name}-{identity.sha256[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results."""
        return {
            "tokenizer": self._text_tokenizer.identity._asdict(),
            "prefix": self._prefix.value,
            "dtype": str(next(self._model.parameters()).dtype).removeprefix("torch."),
        }

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return ln p of each continuation after its context, and whether greedy decoding would give it.

        Context and continuation are encoded as the harness does for its own models: spaces at the context's end
        move to the continuation; then both together, and what comes after as many tokens as the context alone has
        is the continuation. If that leaves nothing, because a token reaches across, the continuation is encoded by
        itself. A context may be empty.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        sequences = (
            continuation(
                prefix_tokens(self._prefix, self._text_tokenizer, is_alone=not before) + before, target
            )
            for before, target in pairs
        )
        results = [(0.0, True)] * len(pairs)
        for score in self._scores(sequences, len(pairs), "loglikelihood", disable_tqdm, with_greedy=True):
            assert score.greedy is not None
            is_greedy = int(score.greedy.sum()) == len(pairs[score.index][1])
            results[score.index] = (-float(score.losses.sum(dtype=np.float64)), is_greedy)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of each whole text; the state goes through all of it, so there are no windows."""
        before = prefix_tokens(self._prefix, self._text_tokenizer, is_alone=True)
        sequences = (
            continuation(before, self._text_tokenizer.encode(request.args[0])) for request in requests
        )
        results = [0.0] * len(requests)
        for score in self._scores(sequences, len(requests), "loglikelihood_rolling", disable_tqdm):
            results[score.index] = -float(score.losses.sum(dtype=np.float64))
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string or the end of the document."""
        texts = [""] * len(requests)
        made = generate_side_by_side(
            self._model,
            self._text_tokenizer,
            (self._prompt(number, *request.args) for number, request in enumerate(requests)),
            batch_size=self._batch_size,
        )
        for index, text in _with_progress(made, len(requests), "generate_until", disable_tqdm):
            texts[index] = text
        return texts

    def _encode_pair(self, context: str, target: str) -> tuple[list[int], list[int]]:
        encode = self._text_tokenizer.encode
        stripped = context.rstrip()
        target = context[len(stripped) :] + target
        before = encode(stripped)
        return before, encode(stripped + target)[len(before) :] or encode(target)

    def _prompt(self, number: int, context: str, gen_kwargs: Mapping[str, Any]) -> Prompt:
        wanted = parse_gen_kwargs(gen_kwargs)
        tokens = self._text_tokenizer.encode(context)
        tokens = prefix_tokens(self._prefix, self._text_tokenizer, is_alone=not tokens) + tokens
        return Prompt(tokens, wanted.settings, wanted.max_tokens, wanted.stop, seed=self._seed + number)

    def _scores(
        self,
        sequences: Iterator[scoring.Sequence],
        n_sequences: int,
        what: str,
        disable_tqdm: bool,
        with_greedy: bool = False,
    ) -> Iterator[scoring.Score]:
        scores = scoring.score_sequences(
            self._model,
            sequences,
            batch_size=self._batch_size,
            chunk_len=self._chunk_len,
            with_greedy=with_greedy,
        )
        return _with_progress(scores, n_sequences, what, disable_tqdm)


def _with_progress(items: Iterator[Any], total: int, what: str, disable: bool) -> Iterator[Any]:
    # None: only where stderr is a terminal.
    return iter(tqdm(items, desc=what, total=total, disable=True if disable else None))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise BackendError(
            f"there is no device '{name}' here; give --device cpu or auto (without it the harness asks for cuda:0)"
        ) from error
    return torch.device(name)


def _one_of(given: Mapping[str, Any], name: str, known: Mapping[str, Any], default: Any) -> Any:
    if name not in given:
        return default
    if given[name] not in known:
        raise ConfigError(
            f"the model argument {name} is {given[name]!r}; it must be one of {', '.join(known)}"
        )
    return known[given[name]]


def _number(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"the model argument {name} is {value!r}; it must be a whole number") from None
