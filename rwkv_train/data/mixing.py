"""Several corpora in fixed proportions: which of them a sample comes from is a pure function of its number."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rwkv_train.config.data import WeightedCorpus
from rwkv_train.config.train import TrainConfig
from rwkv_train.data.mixture import Mixture
from rwkv_train.data.module import CorpusSamples, Drawn
from rwkv_train.data.stored import Corpus


class MixedSamples:
    """Samples of several corpora; each corpus has its own order and its own epochs.

    Args:
        corpora: the tokens of each, memory-mapped.
        parts: name and weight of each.
        config: the settings of the run.

    Raises:
        DataError: a corpus is too small for the order.
    """

    def __init__(
        self, corpora: Sequence[Corpus], parts: Sequence[WeightedCorpus], config: TrainConfig
    ) -> None:
        self._samples = [CorpusSamples(corpus, config, index) for index, corpus in enumerate(corpora)]
        self._names = _short_names([part.path for part in parts])
        self._weights = [part.weight for part in parts]
        self._mixture = Mixture(self._weights)
        self._ctx_len = config.model.ctx_len

    @property
    def identity(self) -> dict[str, object]:
        """Those of the corpora, with their weights, in their order."""
        return {
            "mixture": [
                {**samples.identity, "weight": weight}
                for samples, weight in zip(self._samples, self._weights, strict=True)
            ]
        }

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """Return tokens and targets of a sample, both ``[T]`` int64."""
        part, number = self._mixture.locate(sample)
        return self._samples[part].read(number)

    def n_targets(self, first: int, count: int) -> int:
        """Return the targets of ``count`` samples: every token has one."""
        return count * self._ctx_len

    def drawn(self, n_samples: int) -> tuple[Drawn, ...]:
        """Return what the first ``n_samples`` took from each corpus."""
        counts = self._mixture.drawn(n_samples)
        return tuple(
            Drawn(name, count * self._ctx_len, count / samples.n_slots)
            for name, count, samples in zip(self._names, counts, self._samples, strict=True)
        )


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, or the whole paths where two of those are the same."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
