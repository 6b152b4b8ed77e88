"""Turn text into a tokenized corpus on disk: read, tokenize, choose, write; killed, it goes on where it was."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_train.data.binidx import add_suffix
from rwkv_train.data.preparation.journal import mark_of
from rwkv_train.data.preparation.making import make_parts, prefixes_of
from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.preparation.parts import SUFFIXES, place
from rwkv_train.data.preparation.progress import Progress, Silence
from rwkv_train.data.preparation.reading import read_sources
from rwkv_train.data.preparation.signatures import require_rensa
from rwkv_train.data.preparation.work_folder import open_work_folder
from rwkv_train.data.preparation.workers import suitable_workers
from rwkv_train.data.sidecar import Sidecar
from rwkv_train.data.sources.base import Source
from rwkv_train.data.sources.opening import open_sources
from rwkv_train.errors import ConfigError, DataError
from rwkv_train.tokenizers.base import Tokenizer, token_dtype


class PreparedSummary(NamedTuple):
    """What :func:`prepare_data` made."""

    prefix: Path
    """Of the .bin, .idx, .docs.npy and .json files."""
    sidecar: Sidecar
    """Totals, domains, sources."""


def prepare_data(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    output_prefix: Path,
    options: PrepareOptions | None = None,
    *,
    workers: int | None = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[PreparedSummary, ...]:
    """Tokenize documents into ``.bin/.idx`` and a sidecar, in bounded memory.

    Each document is its tokens and one end-of-document token. Documents without text are skipped and counted. All
    files appear together when they are complete. Until then the work lies in ``PREFIX.unfinished``; the same call goes
    on from there, and ends with the same bytes as one that was never disturbed, with any number of processes.

    Args:
        inputs: what :func:`~rwkv_train.data.sources.opening.open_source` takes, in order.
        tokenizer: what cuts the texts.
        output_prefix: path of the files without their endings; where a part is held out, ``-train`` and ``-valid``
            are added.
        options: how documents are read, chosen and ordered.
        workers: processes that parse and tokenize; 1: this one; ``None``: as many as there are cores, and fewer for
            small inputs. ``load_tokenizer`` must find the tokenizer by its name, unless it is 1.
        overwrite: replace files that exist, instead of refusing.
        progress: told how far it is.

    Returns:
        The corpus, or the training and the held-out part.

    Raises:
        ConfigError: the options make no sense.
        DataError: an input or a record cannot be used, the output exists, is an input or cannot be written, nothing
            is left of the documents, or the unfinished work belongs to other inputs or settings.
        LostProcessError: a worker was killed.
    """
    options = options or PrepareOptions()
    options.check()
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be 1 or more, found {workers}")
    if options.dedup == "minhash":
        require_rensa()
    sources = open_sources(inputs, options.source)
    n_workers = workers or suitable_workers([source.n_bytes for source in sources])
    progress = progress or Silence()
    prefixes = prefixes_of(output_prefix, options)
    _refuse_inputs_as_output(sources, prefixes.values())
    reading = _reading(inputs, sources, tokenizer, options)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<").str
    with open_work_folder(output_prefix, reading, dtype, overwrite=overwrite) as work:
        if work.journal.placing is None:
            _refuse_existing(prefixes.values(), overwrite=overwrite)
            read_sources(work, sources, tokenizer, options, n_workers, progress)
            made = make_parts(work, tokenizer, options, n_workers, prefixes, progress)
            _refuse_existing(prefixes.values(), overwrite=overwrite)  # hours may have passed
            work.begin_placing(made)
        placing = work.journal.placing
        assert placing is not None
        if placing["chosen"] != options.choosing():
            raise DataError(
                f"{work.path} holds files that are finished but for their places, chosen by {placing['chosen']}: give "
                "the same command again, or remove the folder"
            )
        place(work.path, output_prefix.parent, placing["moves"])
        work.remove()
    return tuple(_summary(prefix) for prefix in prefixes.values())


def _reading(
    inputs: Sequence[str | Path], sources: Sequence[Source], tokenizer: Tokenizer, options: PrepareOptions
) -> dict[str, Any]:
    """Return, as JSON's types, all that the tokens of the documents depend on."""
    return {
        "tokenizer": tokenizer.identity.sha256,
        "inputs": [f"{name} ({mark_of(source)})" for name, source in zip(inputs, sources, strict=True)],
        "options": options.reading(),
    }


def _refuse_existing(prefixes: Iterable[Path], *, overwrite: bool) -> None:
    for path in (add_suffix(prefix, suffix) for prefix in prefixes for suffix in SUFFIXES):
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists already; choose another output or ask for overwriting")


def _refuse_inputs_as_output(sources: Sequence[Source], prefixes: Iterable[Path]) -> None:
    """Refuse to replace what is read: it would be gone, and the same command could not be given again."""
    written = {
        _identify(path): path
        for prefix in prefixes
        for path in (add_suffix(prefix, suffix) for suffix in SUFFIXES)
        if path.exists()
    }
    if not written:  # no input is among files that are not there
        return
    for source in sources:
        for file in source.files():
            if file.exists() and (output := written.get(_identify(file))):
                raise DataError(
                    f"the output {output} is a file of the input {source.name}, which would be replaced; choose "
                    "another --output"
                )


def _identify(path: Path) -> tuple[int, int]:
    """Return what is the same for a file under any of its names."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _summary(prefix: Path) -> PreparedSummary:
    path = add_suffix(prefix, ".json")
    return PreparedSummary(prefix, Sidecar.from_json(path.read_bytes(), str(path)))
