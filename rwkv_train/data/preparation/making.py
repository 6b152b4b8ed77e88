"""The second half of a preparation: the documents are chosen and the files made, all but moved to their places."""

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from rwkv_train.data.binidx import add_suffix
from rwkv_train.data.preparation.choosing import Chosen, Order, choose
from rwkv_train.data.preparation.journal import Journal, Json
from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.preparation.parts import PartTotals, moves_of_parts, write_part
from rwkv_train.data.preparation.progress import Progress
from rwkv_train.data.preparation.work_folder import WorkFolder
from rwkv_train.data.sidecar import Preparation, Sidecar, Source
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

PARTS = ("train", "valid")
"""Where a part is held out; each is also what its prefix ends in, after a hyphen."""


def prefixes_of(output_prefix: Path, options: PrepareOptions) -> dict[str, Path]:
    """Return the prefix of each part; a corpus that is not divided is "all"."""
    if options.valid_fraction is None:
        return {"all": output_prefix}
    return {part: add_suffix(output_prefix, f"-{part}") for part in PARTS}


def make_parts(
    work: WorkFolder,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    n_workers: int,
    prefixes: Mapping[str, Path],
    progress: Progress,
) -> Json:
    """Choose the documents and write all files into the work folder.

    Args:
        work: holds all documents.
        tokenizer: what made the tokens.
        options: how they are chosen.
        n_workers: processes.
        prefixes: from :func:`prefixes_of`.
        progress: told of the stages.

    Returns:
        What :meth:`WorkFolder.begin_placing` takes.

    Raises:
        DataError: a part is left without documents.
    """
    work.save()
    folder = work.path / "making"
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    folder.mkdir()
    make_tokenizer: Callable[[], Tokenizer] = partial(load_tokenizer, tokenizer.identity.name)
    if n_workers == 1:
        make_tokenizer = partial(_same, tokenizer)
    progress.begin("choosing", None)
    chosen = choose(work.documents, options, make_tokenizer, n_workers, folder)
    _log(chosen)
    progress.begin("writing", None)
    made: dict[Path, Path] = {}
    for part, prefix in prefixes.items():
        order = chosen.held_out if part == PARTS[1] else chosen.train
        assert order is not None
        _require_documents(part, order, chosen, work.journal, options)
        temporary = folder / part
        totals = write_part(work.documents, order, work.journal.domains, temporary)
        sidecar = _describe(totals, None if part == "all" else part, chosen, work.journal, tokenizer, options)
        # A path of the options or of the tokenizer's file may not be UTF-8; JSON's escape gives back the same path.
        add_suffix(temporary, ".json").write_text(
            sidecar.to_json(), encoding="utf-8", errors="backslashreplace"
        )
        made[temporary] = prefix
    return {"chosen": options.choosing(), "moves": moves_of_parts(work.documents, made)}


def _same(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer


def _require_documents(
    part: str, order: Order, chosen: Chosen, journal: Journal, options: PrepareOptions
) -> None:
    if len(order):
        return
    n_leaked = sum(chosen.n_leaked.values())
    raise DataError(
        f"--valid-fraction {options.valid_fraction} of {journal.n_documents} documents leaves the part '{part}' empty"
        + (f" ({n_leaked} were held out, and training has too much of them)" if n_leaked else "")
        + "; choose another one, the tokens that are done are kept"
    )


def _describe(
    totals: PartTotals,
    part: str | None,
    chosen: Chosen,
    journal: Journal,
    tokenizer: Tokenizer,
    options: PrepareOptions,
) -> Sidecar:
    return Sidecar(
        tokenizer=tokenizer.identity,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        dtype=np.dtype(journal.dtype).name,
        n_documents=totals.n_documents,
        n_skipped_empty=journal.n_empty,
        n_tokens=totals.n_tokens,
        n_bytes=sum(domain.n_bytes for domain in totals.domains),
        max_token=totals.max_token,
        sha256=totals.sha256,
        domains=totals.domains,
        sources=tuple(Source(**source) for source in journal.sources),
        n_words=sum(domain.n_words or 0 for domain in totals.domains),
        preparation=Preparation(
            settings=options.given(),
            part=part,
            n_skipped_bad=journal.n_bad,
            first_bad=tuple(journal.first_bad),
            n_duplicates={journal.domains[index]: n for index, n in chosen.n_duplicates.items()},
            n_leaked={journal.domains[index]: n for index, n in chosen.n_leaked.items()},
        ),
    )


def _log(chosen: Chosen) -> None:
    for what, counts in (("duplicates", chosen.n_duplicates), ("leaked documents", chosen.n_leaked)):
        if counts:
            logger.info("%s left out: %d", what, sum(counts.values()))
