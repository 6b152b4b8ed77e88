"""Several runs one after the other in one process, a rank of torchrun's environment or alone; for test_parity.py.

Called with a JSON file: a list of settings, each with what the run goes on from. Samples have holes: some targets are
-100, so that micro-batches differ in their number of valid ones. Which samples a process read goes to
``out_dir/samples-STEP-RANK.json``, in order.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from rwkv_train.config.load import check_tree
from rwkv_train.data.module import CorpusSamples
from rwkv_train.parallel.processes import join_processes
from rwkv_train.training import corpora, run

CTX_LEN = 16


def n_holes(sample):
    """Return how many targets at the head of a sample are not to be predicted."""
    return 5 * sample % 14


class SamplesWithHoles(CorpusSamples):
    """A corpus, some targets of which are not to be predicted; it notes what is read."""

    def __init__(self, corpus, config):
        super().__init__(corpus, config)
        self.reads = []

    def read(self, sample):
        self.reads.append(sample)
        tokens, targets = super().read(sample)
        targets = targets.clone()
        targets[: n_holes(sample)] = -100
        return tokens, targets

    def n_targets(self, first, count):
        return sum(CTX_LEN - n_holes(sample) for sample in range(first, first + count))


def main(path):
    runs = [(check_tree(tree), resume) for tree, resume in json.loads(Path(path).read_text())]
    opened = []

    def open_samples(corpus, config):
        opened.append(SamplesWithHoles(corpus, config))
        return opened[-1]

    corpora.CorpusSamples = open_samples
    run.plot_run = lambda *given: None  # a picture takes as long as a run
    with join_processes(runs[0][0].trainer, backend="gloo", always=True) as processes:

        @contextmanager
        def joined(settings, **options):
            yield processes

        run.join_processes = joined
        for config, resume in runs:
            summary = run.run_pretraining(config, resume)
            notes = summary.out_dir / f"samples-{summary.n_steps}-{processes.rank}.json"
            notes.write_text(json.dumps(opened[-1].reads))


if __name__ == "__main__":
    main(sys.argv[1])
