"""A dataset of Hugging Face's library, row by row."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rwkv_train.config.data import DatasetConfig
from rwkv_train.data.hub_dataset import open_text_dataset, show
from rwkv_train.data.sources.base import (
    BLOCK_BYTES,
    COLUMN_OPTIONS,
    BadRecord,
    Block,
    Source,
    SourceIdentity,
    SourceOptions,
    show_path,
)
from rwkv_train.data.sources.rows import Row, RowBlock
from rwkv_train.errors import DataError

HUB_PREFIX = "hf:"
"""What stands before the name or the folder of a dataset."""

_MAX_ROWS = 1 << 14  # of a block


class HubSource(Source):
    """A dataset; rows are counted from 0, as the library does.

    Its size is that of its texts in UTF-8, or of whole records as JSON.

    Args:
        path: its name on the hub, or a local folder.
        options: configuration, split, columns, streamed or not.

    Raises:
        DataError: there is no such dataset, or it cannot be reached.
    """

    uses = COLUMN_OPTIONS | {"dataset_config", "dataset_split", "dataset_streaming"}

    def __init__(self, path: str, options: SourceOptions) -> None:
        if not path:
            raise DataError(f"{HUB_PREFIX} names no dataset; wanted {HUB_PREFIX}NAME or {HUB_PREFIX}FOLDER")
        self.path = path
        self.options = options
        spec = DatasetConfig(
            path=path,
            name=options.dataset_config,
            split=options.dataset_split,
            text_column=options.text_column,
            domain_column=options.domain_column,
        )
        self._dataset = open_text_dataset(
            spec, streaming=options.dataset_streaming, whole_rows=options.whole_records
        )
        self.name = HUB_PREFIX + show_path(show(spec))
        self.n_bytes = None
        self._identity: SourceIdentity | None = None

    def describe(self) -> SourceIdentity:
        """Return name, size and hash of all texts in their order; once it was read to the end it costs nothing."""
        if self._identity is None:
            for _ in self._cut():
                pass
        assert self._identity is not None
        return self._identity

    def files(self) -> Sequence[Path]:
        """Return all of a local folder; a dataset of the hub is taken for the same by its name."""
        folder = Path(self.path).expanduser()
        return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []

    def _cut(self) -> Iterator[Block]:
        rows: list[Row | BadRecord] = []
        n_rows, n_bytes, n_total = 0, 0, 0
        texts = hashlib.sha256()
        for number, text, domain, fields in self._dataset.rows():
            rows.append(Row(number, text, domain, fields))
            shown = text if fields is None else json.dumps(fields, default=str)
            data = shown.encode(errors="surrogatepass") if isinstance(shown, str) else b""
            texts.update(len(data).to_bytes(8, "little") + data)
            n_rows += 1
            n_bytes += len(data)
            if n_bytes >= BLOCK_BYTES or len(rows) >= _MAX_ROWS:
                yield self._block(rows, n_bytes)
                n_total += n_bytes
                rows, n_bytes = [], 0
        if n_rows == 0:
            raise DataError(f"{self.name} holds no documents")
        if rows:
            yield self._block(rows, n_bytes)
        self._identity = SourceIdentity(self.name, n_total + n_bytes, texts.hexdigest())

    def _block(self, rows: list[Row | BadRecord], n_bytes: int) -> Block:
        return RowBlock(f"{self.name}, row", tuple(rows), self.options, n_bytes)
