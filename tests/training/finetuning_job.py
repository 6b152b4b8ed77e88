"""Several finetuning runs one after the other as a rank of torchrun's environment; for test_finetuning_processes.py.

Called with a JSON file: a list of settings, each with what the run goes on from.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from rwkv_train.config.load import check_finetune_tree
from rwkv_train.parallel.processes import join_processes
from rwkv_train.training import run
from rwkv_train.training.finetuning import run_finetuning


def main(path):
    runs = [(check_finetune_tree(tree), resume) for tree, resume in json.loads(Path(path).read_text())]
    run.plot_run = lambda *_: None  # a picture takes as long as a run
    with join_processes(runs[0][0].trainer, backend="gloo", always=True) as processes:

        @contextmanager
        def joined(settings, **options):
            yield processes

        run.join_processes = joined
        for config, resume in runs:
            run_finetuning(config, resume)


if __name__ == "__main__":
    main(sys.argv[1])
