"""How fast text is scored: by us, and by lm-evaluation-harness with the same weights in transformers."""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rwkv_train.checkpoints import Weights, load_model, write_weights
from rwkv_train.config.model import ModelConfig
from rwkv_train.data.sources.base import Document
from rwkv_train.errors import ConfigError
from rwkv_train.evaluation.perplexity import Reading, evaluate_documents
from rwkv_train.evaluation.totals import bits_per_byte
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.tokenizers import Tokenizer

Json = dict[str, Any]

NEEDS = ("lm_eval", "transformers", "accelerate")
"""What the other side is made of."""


def bench_evaluating(
    config: ModelConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    repeats: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Json]:
    """Score texts with random weights in float32, in turns, each whole: tokens in, one sum of nats out.

    All three read one Hugging Face folder. Loading is not counted; tokenizing is.

    Args:
        config: sizes of the model, of RWKV-4: the only version that transformers has itself.
        tokenizer: one that can be written for transformers: World or bytes.
        texts: each shorter than ``config.ctx_len`` tokens, so that the harness does not cut it into windows.
        batch_size: texts that are read side by side, in all of them.
        repeats: measurements after one that is not counted; the median counts.
        device: where the models run.

    Yields:
        One row for each way: ``by``, sizes, ``documents``, ``tokens``, ``batch_size``, ``repeats``, ``seconds``,
        ``tokens_per_second``, ``ratio`` (of the speed to that of the harness with transformers) and
        ``bits_per_byte``, which must be the same for all.

    Raises:
        ConfigError: the version is not RWKV-4, or a package of ``NEEDS`` is not installed.
    """
    if config.arch != "rwkv4":
        raise ConfigError(
            f"bench evaluating needs a model of rwkv4, which transformers has; not {config.arch}"
        )
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"bench evaluating needs {', '.join(missing)}: pip install 'lm-eval[hf]'")
    with tempfile.TemporaryDirectory(prefix="rwkv-train-bench-") as name:
        folder = Path(name) / "model"
        model = build_model(config)
        initialize(model, seed=0)
        write_weights(folder, Weights(config, model.state_dict(), tokenizer.identity, step=None), "hf")
        ways = _ways(folder, tokenizer, texts, batch_size, torch.device(device))
        seconds, nats = _time_in_turns(ways, repeats, torch.device(device))

    n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    n_bytes = sum(len(text.encode()) for text in texts)
    slowest = seconds["lm_eval, transformers"]
    for by, found in seconds.items():
        yield {
            "by": by,
            "arch": config.arch,
            "L": config.n_layer,
            "C": config.n_embd,
            "V": config.vocab_size,
            "documents": len(texts),
            "tokens": n_tokens,
            "batch_size": batch_size,
            "repeats": repeats,
            "seconds": found,
            "tokens_per_second": n_tokens / found,
            "ratio": slowest / found,
            "bits_per_byte": bits_per_byte(nats[by], n_bytes),
        }


def _ways(
    folder: Path, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int, device: torch.device
) -> dict[str, Callable[[], float]]:
    """Return what is measured: functions that score all texts and return their nats."""
    from lm_eval.api.instance import Instance  # noqa: PLC0415
    from lm_eval.api.registry import get_model  # noqa: PLC0415

    from rwkv_train.evaluation.harness import RwkvTrainLM  # noqa: PLC0415  # heavy, and may not be installed

    model, _ = load_model(folder, device=device)
    adapter = RwkvTrainLM(model, tokenizer, batch_size=batch_size)
    theirs = get_model("hf")(
        pretrained=str(folder), device=str(device), dtype="float32", batch_size=batch_size
    )
    documents = [Document(text, "bench") for text in texts]
    reading = Reading(prefix_token=tokenizer.end_of_document, batch_size=batch_size)
    requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
    return {
        "eval-ppl": lambda: evaluate_documents(model, tokenizer, documents, reading).total.nats,
        "lm_eval, rwkv-train": lambda: -sum(adapter.loglikelihood_rolling(requests, disable_tqdm=True)),
        "lm_eval, transformers": lambda: -sum(theirs.loglikelihood_rolling(requests, disable_tqdm=True)),
    }


def _time_in_turns(
    ways: dict[str, Callable[[], float]], repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of each way and what it found; what else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {by: [] for by in ways}
    found: dict[str, float] = {}
    for turn in range(repeats + 1):
        for by, score in ways.items():
            began = time.perf_counter()
            found[by] = score()  # a number on the CPU: a GPU is done by then
            if turn:
                seconds[by].append(time.perf_counter() - began)
    return {by: statistics.median(each) for by, each in seconds.items()}, found
