"""The first half of a preparation: the inputs, block by block through the workers, into the work folder."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

from rwkv_train.data.preparation.blocks import BlockTokenizer, TokenizedBlock, load_block_tokenizer
from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.preparation.progress import Progress
from rwkv_train.data.preparation.work_folder import WorkFolder
from rwkv_train.data.preparation.workers import ordered_map
from rwkv_train.data.sources.base import Block, Source
from rwkv_train.data.sources.domains import require_kept
from rwkv_train.errors import DataError
from rwkv_train.tokenizers.base import Tokenizer


def read_sources(
    work: WorkFolder,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: PrepareOptions,
    n_workers: int,
    progress: Progress,
) -> None:
    """Read what is not read yet.

    Args:
        work: takes the documents.
        sources: all inputs, in order.
        tokenizer: what cuts the texts.
        options: how they are read.
        n_workers: processes.
        progress: told of the bytes that are done, first of those of an earlier attempt.

    Raises:
        DataError: an input is damaged, holds a record that cannot be used, or there is no document in all of them.
    """
    make: Callable[[], Callable[[Block], TokenizedBlock]]
    with_signatures = options.dedup == "minhash"
    if n_workers == 1:
        make = partial(BlockTokenizer, tokenizer, options.domains, with_signatures)
    else:
        make = partial(load_block_tokenizer, tokenizer.identity, options.domains, with_signatures)
    _refuse_bad(work.journal.first_bad, options)
    sizes = [source.n_bytes for source in sources]
    progress.begin("tokenizing", None if None in sizes else sum(filter(None, sizes)))
    progress.advance(work.journal.n_source_bytes)
    origins: deque[int] = deque()
    blocks = _blocks(sources, work.journal.source, work.journal.block, origins)
    with closing(ordered_map(make, blocks, n_workers)) as results:
        for result in results:
            _finish_sources(work, sources, origins.popleft())
            _refuse_bad([str(record) for record in result.first_bad], options)
            work.add(result)
            progress.advance(result.n_source_bytes)
    _finish_sources(work, sources, len(sources))
    journal = work.journal
    require_kept(options.domains, journal.n_documents + journal.n_empty, journal.left_out)
    if journal.n_documents == 0:
        names = ", ".join(source.name for source in sources)
        if journal.n_bad:
            raise DataError(
                f"no record of {names} can be used: {journal.n_bad} are bad, the first is {journal.first_bad[0]}"
            )
        raise DataError(f"none of the documents in {names} has any text")


def _blocks(sources: Sequence[Source], first: int, start: int, origins: deque[int]) -> Iterator[Block]:
    """Yield the blocks of all sources from one of the first on, and note of which source each is."""
    for index in range(first, len(sources)):
        for block in sources[index].blocks(start if index == first else 0):
            origins.append(index)
            yield block


def _finish_sources(work: WorkFolder, sources: Sequence[Source], current: int) -> None:
    while work.journal.source < current:
        work.finish_source(sources[work.journal.source].describe()._asdict())


def _refuse_bad(bad: Sequence[str], options: PrepareOptions) -> None:
    if bad and not options.skip_bad:
        raise DataError(
            f"{bad[0]}; --skip-bad-lines passes over such records and counts them, and goes on from what is done; "
            "once the input is mended, --overwrite reads it anew and keeps what is done of those before it"
        )
