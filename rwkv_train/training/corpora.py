"""The data of a run: opened, and checked against its settings before anything else starts."""

from pathlib import Path
from typing import NamedTuple

from rwkv_train.checkpoints.formats import MANIFEST_FILE
from rwkv_train.checkpoints.training_state import TrainingCheckpoint
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.builtin import BUILTIN, ensure_builtin
from rwkv_train.data.hub_dataset import TextDataset, open_text_dataset
from rwkv_train.data.mixing import MixedSamples
from rwkv_train.data.module import CorpusSamples, Samples, n_slots
from rwkv_train.data.stored import Corpus, load_corpus
from rwkv_train.data.streaming import StreamSamples, StreamState
from rwkv_train.errors import CheckpointError, DataError
from rwkv_train.tokenizers import Tokenizer, load_tokenizer


class Corpora(NamedTuple):
    """The data of a run."""

    train: tuple[Corpus, ...]
    """The prepared corpora, in the order of ``data.train``; none where the run streams."""
    stream: TextDataset | None
    """The dataset of ``data.streaming``."""
    valid: Corpus | None
    tokenizer: Tokenizer

    @property
    def train_tokens(self) -> int | None:
        """Tokens of the prepared corpora together; ``None`` where the run streams."""
        return sum(corpus.tokens.n_tokens for corpus in self.train) if self.train else None


def open_corpora(config: TrainConfig) -> Corpora:
    """Open the data of a run and check that they fit it.

    Raises:
        DataError: they are missing, damaged, too short, or of another tokenizer or vocabulary; documents lack the end
            that ``data.documents: reset`` needs.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    train = tuple(_open_train(config, path, tokenizer) for path in config.data.train_paths)
    stream = None
    if config.data.streaming is not None:
        stream = open_text_dataset(config.data.streaming, streaming=True)
        _require_text(stream)
    valid = None
    if config.data.valid is not None:
        valid = _open(config, config.data.valid, "valid", tokenizer)
    return Corpora(train, stream, valid, tokenizer)


def open_samples(config: TrainConfig, corpora: Corpora) -> Samples:
    """Return the training samples of a run.

    Raises:
        DataError: a corpus is too small for the order, or the tokenizer has ids that the model has not.
    """
    if corpora.stream is not None:
        return StreamSamples(corpora.stream, corpora.tokenizer, config)
    if isinstance(config.data.train, list):
        return MixedSamples(corpora.train, config.data.train, config)
    (corpus,) = corpora.train
    return CorpusSamples(corpus, config)


def samples_in_epoch(config: TrainConfig, corpora: Corpora) -> int:
    """Return how many samples one pass has, for a run that is so many epochs long; 0 where an epoch has no meaning."""
    return n_slots(corpora.train[0], config) if isinstance(config.data.train, str) else 0


def go_to(samples: Samples, first_sample: int, saved: TrainingCheckpoint | None) -> None:
    """Bring a stream to where a run goes on; other samples are found by their number alone.

    Args:
        samples: those of the run.
        first_sample: number of the sample that is read next.
        saved: the checkpoint that the run goes on from; ``None`` from scratch.

    Raises:
        CheckpointError: the checkpoint does not say where its stream stood.
    """
    if not isinstance(samples, StreamSamples):
        return
    if saved is None:
        samples.begin(first_sample)
        return
    try:
        state = StreamState.of(saved.manifest["data"]["stream"], saved.stream())
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{saved.folder / MANIFEST_FILE} cannot be used: it does not say where its stream stood ({error})"
        ) from error
    samples.begin(first_sample, state)


def _open_train(config: TrainConfig, path: str, tokenizer: Tokenizer) -> Corpus:
    corpus = _open(config, path, "train", tokenizer)
    corpus.require_length(config.model.ctx_len)
    if config.data.documents == "reset":
        corpus.require_end_tokens(tokenizer.end_of_document)
    return corpus


def _open(config: TrainConfig, path: str, split: str, tokenizer: Tokenizer) -> Corpus:
    if path == BUILTIN:
        prefix = ensure_builtin(Path(config.data.cache_dir).expanduser(), tokenizer)[split]
    else:
        prefix = Path(path).expanduser()
    corpus = load_corpus(prefix)
    corpus.require_tokenizer(tokenizer.identity)
    corpus.require_vocab(config.model.vocab_size)
    return corpus


def _require_text(dataset: TextDataset) -> None:
    """Read one row: a column of numbers is noticed before the model is made."""
    row = next(dataset.rows(), None)
    if row is None:
        raise DataError(f"data.streaming.path ({dataset.spec.path}) has no rows")
    dataset.text_of(row)
