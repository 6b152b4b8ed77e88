"""The documents of any text, one after another in this process: what evaluation and small corpora need."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from rwkv_train.data.sources.base import UNKNOWN_DOMAIN, BadRecord, Document, SourceOptions
from rwkv_train.data.sources.domains import DomainChoice, require_kept
from rwkv_train.data.sources.opening import open_sources
from rwkv_train.errors import DataError

__all__ = ["UNKNOWN_DOMAIN", "Document", "read_documents"]

logger = logging.getLogger(__name__)

_N_SHOWN = 3  # of the bad records that are passed over


def read_documents(
    inputs: Sequence[str | Path],
    *,
    options: SourceOptions | None = None,
    domains: Collection[str] | None = None,
    skip_bad: bool = False,
    keep_empty: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """Yield the documents of all inputs, in order, in bounded memory.

    Args:
        inputs: what :func:`~rwkv_train.data.sources.opening.open_source` takes.
        options: how they are read.
        domains: yield only documents of these; ``None``: all.
        skip_bad: pass over records that are no documents, and log at the end how many and which were the first,
            instead of raising at the first one. Damage of a file is raised either way.
        keep_empty: yield documents without any text too, instead of skipping them.
        on_bytes: called with the number of bytes of the source (as stored) that were read since the last call.

    Raises:
        DataError: an input is missing, empty, cut off or of another kind, or a record is not what it should be
            (the message names the file and the line or row); or no document is of the ``domains``.
        ConfigError: an option changes nothing for any input.
    """
    choice = DomainChoice(domains)
    bad: list[BadRecord] = []  # the first ones
    n_bad = 0
    try:
        for source in open_sources(inputs, options):
            for block in source.blocks():
                for record in block.records():
                    if isinstance(record, BadRecord):
                        if not skip_bad:
                            raise DataError(str(record))
                        n_bad += 1
                        bad = [*bad, record][:_N_SHOWN]
                    elif choice.keeps(record.domain) and (record.text or keep_empty):
                        yield record
                if on_bytes is not None:
                    on_bytes(block.n_bytes)
    finally:  # also where the caller stops early
        if n_bad:
            logger.warning("skipped %d bad records; the first: %s", n_bad, "; ".join(map(str, bad)))
    require_kept(domains, choice.n_kept, choice.left_out)
