"""Runs in processes of their own: interrupted, shared by two processes. Killed ones: tests/campaigns/kill.py."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rwkv_train.checkpoints import list_training_checkpoints, load_training_checkpoint
from tests import forks
from tests.campaigns.runs import look

CHECKOUT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120


@pytest.fixture
def command(tree, tmp_path):
    """Make the command line of a run with some settings changed."""

    def make(name, **changes):
        tree["trainer"] |= {"out_dir": str(tmp_path / name), **changes}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return [str(CHECKOUT / "cli.py"), "pretrain", "--config", str(path)]

    return make


def newest(out_dir):
    found = list_training_checkpoints(out_dir)
    return found[-1].name if found else None


def wait_for_progress(process, out_dir, before):
    """Wait until the process has written a checkpoint of its own."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while newest(out_dir) == before and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)


def metric(out_dir, column):
    with (out_dir / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_a_signal_saves_and_leaves_with_its_code(command, tmp_path, number, code):
    process = forks.start(command("run", max_steps=100_000), tmp_path / "log.txt")
    wait_for_progress(process, tmp_path / "run", None)
    os.kill(process.pid, number)
    codes = forks.end([process], PATIENCE_SECONDS)
    log = (tmp_path / "log.txt").read_text()

    assert codes == [code], log
    assert "saving after this step" in log
    assert "Traceback" not in log
    step = int(newest(tmp_path / "run").removeprefix("step-"))
    assert f"stopping after step {step} of 100000" in log


def wait_for_a_save(process, out_dir):
    """Wait until the process writes another checkpoint."""
    while process.is_alive() and not any((out_dir / "checkpoints").glob(".rwkv-train-new-*")):
        time.sleep(0.0003)


@pytest.mark.parametrize(("rank", "in_a_save"), [(1, False), (0, True)], ids=["rank 1", "rank 0 in a save"])
def test_a_killed_rank_is_named_and_the_run_goes_on_to_the_undisturbed_end(
    command, tree, tmp_path, rank, in_a_save
):
    tree["checkpoint"] |= {
        "every_n_steps": 1,
        "max_file_gb": 1e-4,
    }  # several files, so a save that takes longer
    many = {"max_steps": 40, "devices": 2, "val_every_n_steps": 100}
    logs = [tmp_path / f"{number}.txt" for number in range(2)]

    ranks = forks.start_ranks([command("killed", **many)] * 2, logs)
    wait_for_progress(ranks[0], tmp_path / "killed", None)
    if in_a_save:
        wait_for_a_save(ranks[0], tmp_path / "killed")
    ranks[rank].kill()
    codes = forks.end(ranks, PATIENCE_SECONDS)
    log = logs[1 - rank].read_text()
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 75), log
    assert [line for line in log.splitlines() if line.startswith("error:")] == [
        f"error: rank {rank} is gone or does not answer; the same command goes on from the last checkpoint"
    ]
    left = look(tmp_path / "killed")
    assert left.broken == []
    assert left.newest < 40

    for name in ("killed", "undisturbed"):
        codes = forks.end(forks.start_ranks([command(name, **many)] * 2, logs), PATIENCE_SECONDS)
        assert codes == [0, 0], [log.read_text() for log in logs]
    ended, undisturbed = (look(tmp_path / name) for name in ("killed", "undisturbed"))
    assert ended.broken == ended.temporary == []
    assert ended.whole[40] == undisturbed.whole[40]  # hashes of weights and moments


def test_two_processes_learn_what_one_learns(command, tmp_path):
    line = command("alone", micro_batch_size=8)
    codes = forks.end([forks.start(line, tmp_path / "log.txt")], PATIENCE_SECONDS)
    assert codes == [0], (tmp_path / "log.txt").read_text()
    line = [sys.executable, *command("shared", micro_batch_size=4, devices=2)]
    shared = subprocess.run(line, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert shared.returncode == 0, shared.stderr

    assert shared.stdout.count("validation loss") == 1
    one, other = (
        load_training_checkpoint(tmp_path / name / "checkpoints/step-00000012")
        for name in ("alone", "shared")
    )
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=1e-3, atol=2e-5)
    # Adam does not see the scale of a loss, so equal weights do not show it; these do.
    for column in ("loss", "grad_norm"):
        assert metric(tmp_path / "shared", column) == pytest.approx(
            metric(tmp_path / "alone", column), rel=1e-3
        )
    total = [state.manifest["validation"]["total"] for state in (one, other)]
    assert total[0]["documents"] == total[1]["documents"]
    assert total[0]["nats"] == pytest.approx(total[1]["nats"], rel=1e-4)
