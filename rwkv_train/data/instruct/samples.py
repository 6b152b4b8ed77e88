"""Which conversation comes when: a pure function of the seed and the sample's number."""

from collections.abc import Sequence

from rwkv_train.data.mixture import Mixture
from rwkv_train.data.sampler import seed_of_corpus, slot_of_sample


class ConversationOrder:
    """Several datasets mixed by weight, each in an order of its own that is new in every epoch of it.

    Args:
        sizes: conversations of each dataset.
        weights: its part of the samples, relative to the others.
        seed: which orders.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes = sizes
        self._mixture = Mixture(weights)
        self._seed = seed

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the dataset of a sample and its conversation in it, both from 0."""
        dataset, number = self._mixture.locate(sample)
        seed = seed_of_corpus(self._seed, dataset)
        return dataset, slot_of_sample(number, self._sizes[dataset], seed, "shuffled")

    def drawn(self, n_samples: int) -> tuple[int, ...]:
        """Return how many of the first ``n_samples`` each dataset has."""
        return self._mixture.drawn(n_samples)
