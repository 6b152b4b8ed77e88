"""MinHash signatures: the share of equal numbers in two of them estimates how much two texts have in common."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rwkv_train.data.preparation.windows import window_hashes, word_hashes
from rwkv_train.errors import DataError

Signatures = npt.NDArray[np.uint32]

N_PERMUTATIONS = 128
SHINGLE_WORDS = 5
"""The set that is compared are the text's windows of so many words."""

_SEED = 1


def require_rensa() -> None:
    """Refuse at once where the library is not installed.

    Raises:
        DataError: it is not; with the command that installs it.
    """
    try:
        import rensa  # noqa: F401, PLC0415 - an extra, wanted only here
    except ImportError as error:
        raise DataError("--dedup minhash needs rensa: pip install 'rwkv-train[dedup]'") from error


def signatures_of(texts: Sequence[bytes]) -> Signatures:
    """Return the signature of each text.

    Args:
        texts: in UTF-8. One of fewer words than a window is one window.

    Returns:
        ``[n, 128]``. The expected share of equal numbers in two rows is the Jaccard index of the two sets.

    Source:
        Broder 1997, "On the resemblance and containment of documents".
    """
    if not texts:
        return np.empty((0, N_PERMUTATIONS), np.uint32)
    from rensa import RMinHash  # noqa: PLC0415

    sets = [_shingles(text) for text in texts]
    offsets = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), offsets, N_PERMUTATIONS, _SEED
    )
    return np.array(matrix.to_rows(), np.uint32)


def _shingles(text: bytes) -> npt.NDArray[np.uint64]:
    words = word_hashes(text)
    if not len(words):
        return np.zeros(1, np.uint64)  # white space alone
    return window_hashes(words, min(SHINGLE_WORDS, len(words)))
