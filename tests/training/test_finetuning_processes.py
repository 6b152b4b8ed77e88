"""Two processes learn what one learns; long conversations and the reference of pairs are shared between them."""

import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rwkv_train.checkpoints import open_training_checkpoint
from rwkv_train.config.load import check_finetune_tree
from rwkv_train.training import run
from rwkv_train.training.finetuning import run_finetuning
from tests import forks

JOB = Path(__file__).with_name("finetuning_job.py")
METHODS = {
    "lora": {"method": "lora", "rank": 4, "variant": "dora"},
    "state": {"method": "state"},
    "pairs": {"method": "lora", "rank": 4},
}


def metric(out_dir, column):
    """By step."""
    with (out_dir / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


@pytest.fixture
def trees(chat_tree, chats, tmp_path):
    """Settings of each run, by name."""
    found = {}
    chat_tree["data"]["valid"] = [{"path": str(chats / "valid.jsonl")}]
    chat_tree["checkpoint"] = {"every_n_steps": 2, "keep_last": 9}
    for name, method in METHODS.items():
        tree = json.loads(json.dumps(chat_tree)) | {"finetune": method}
        tree["trainer"] |= {"out_dir": str(tmp_path / name), "max_steps": 4}
        if name == "pairs":
            datasets = [{"path": str(chats / "pairs.jsonl"), "format": "preference"}]
            tree["data"] = {"datasets": datasets, "valid_fraction": 0.2, "tokenizer": "bytes"}
            tree |= {"preference": {"loss": "dpo"}, "optim": {**tree["optim"], "l2wrap": 0.0}}
        found[name] = tree
    return found


def test_two_processes_learn_what_one_learns(trees, tmp_path, monkeypatch):
    """Runs on conversations go on from half-way of the one that a single process has made, in the middle of some."""
    monkeypatch.setattr(run, "plot_run", lambda *_: None)
    jobs = []
    for name, tree in trees.items():
        run_finetuning(check_finetune_tree(tree))
        half_way = tmp_path / name / "checkpoints/step-00000002"
        shared = json.loads(json.dumps(tree))
        shared["trainer"] |= {"out_dir": str(tmp_path / f"{name}-2"), "devices": 2, "micro_batch_size": 1}
        jobs.append([shared, "none" if name == "pairs" else str(half_way)])
        if name != "pairs":
            carried = open_training_checkpoint(half_way).carried()
            assert {int(each.partition(".")[0]) % 2 for each in carried} == {0, 1}  # of both processes' lanes
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    logs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    codes = forks.end(forks.start_ranks([[JOB, path]] * 2, logs), 240)
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)

    for name in trees:
        for column in ("loss", "grad_norm", "val_loss"):
            alone, shared = metric(tmp_path / name, column), metric(tmp_path / f"{name}-2", column)
            steps = [step for step in alone if step > 2 or name == "pairs"]
            assert steps
            assert [shared[step] for step in steps] == pytest.approx(
                [alone[step] for step in steps], rel=1e-4
            )
    one, other = (load_file(tmp_path / name / "reference.safetensors") for name in ("pairs", "pairs-2"))
    for name, values in one.items():
        assert other[name].tolist() == pytest.approx(values.tolist(), rel=1e-5)
