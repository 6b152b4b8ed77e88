"""What several tests of sources do: read one, and write small ones by writers that are not ours."""

import csv

import pyarrow as pa
import zstandard

from rwkv_train.data.sources.base import Document, SourceOptions
from rwkv_train.data.sources.opening import open_source

TEXTS = ["first\nline", "café 日本", 'a "quoted", word', "", "tab\there", "x" * 1000]
DOMAINS = ["code", "prose", "code", "prose", "code", "prose"]
DOCUMENTS = [Document(text, domain) for text, domain in zip(TEXTS, DOMAINS, strict=True)]


def records(name, **options):
    return [r for block in open_source(str(name), SourceOptions(**options)).blocks() for r in block.records()]


def write_csv(path, rows, **form):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **form).writerows(rows)


def table(**columns):
    return pa.table(columns or {"text": TEXTS, "source": DOMAINS, "number": list(range(len(TEXTS)))})


def zstd(data, size=9_999):
    """Compress in frames of ``size`` bytes each."""
    compress = zstandard.ZstdCompressor().compress
    return b"".join(compress(data[at : at + size]) for at in range(0, len(data), size))
