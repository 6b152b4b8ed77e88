"""Keep the documents of some domains."""

from collections import Counter
from collections.abc import Collection, Mapping

from rwkv_train.data.sources.values import show_names
from rwkv_train.errors import DataError


class DomainChoice:
    """Says which documents are wanted, and counts the others.

    Args:
        wanted: names of domains; ``None``: all.
    """

    def __init__(self, wanted: Collection[str] | None) -> None:
        self.wanted = wanted
        self.n_kept = 0
        self.left_out: Counter[str] = Counter()
        """Documents that were not wanted, by domain."""

    def keeps(self, domain: str) -> bool:
        """Say whether a document of this domain is wanted, and count it."""
        is_wanted = self.wanted is None or domain in self.wanted
        if is_wanted:
            self.n_kept += 1
        else:
            self.left_out[domain] += 1
        return is_wanted


def require_kept(wanted: Collection[str] | None, n_kept: int, left_out: Mapping[str, int]) -> None:
    """Refuse a choice of domains that kept nothing.

    Args:
        wanted: the names that were asked for.
        n_kept: documents that were kept, over all processes.
        left_out: documents that were not, by domain, over all processes.

    Raises:
        DataError: nothing was kept though there was something; it names the domains that there are.
    """
    if wanted is None or n_kept or not left_out:
        return
    there = sorted(left_out, key=lambda domain: (-left_out[domain], domain))
    raise DataError(
        f"no document is of the domain {' or '.join(map(repr, sorted(wanted)))}; the domains there are: "
        f"{show_names(there)}"
    )
