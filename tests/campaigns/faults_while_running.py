"""Faults that come while a run trains: it ends in time and says why, and the same command takes it to the same end."""

import json
import math
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.campaigns.disk import SmallDisk
from tests.campaigns.runs import CHECKOUT, Command, SmallRun, kill, look
from tests.campaigns.trial import LOST, REFUSED, Trial

NAN_SAMPLES = Path(__file__).with_name("nan_samples.py")
LARGER = {"model.n_embd": 256, "model.n_layer": 4, "trainer.max_steps": 8}
"""A model whose save takes long enough for something to happen in it: 40 MB."""
LONG_STEPS = {"trainer.global_batch_size": 1024, "trainer.max_steps": 4}
"""A step takes a second or more."""
SAVES_WITHIN_SECONDS = 20.0
LOST_WITHIN_SECONDS = 60.0
BAD_STEP = 7


def full_disk_during_a_save(trial: Trial) -> None:
    """The space goes while a checkpoint is being written; those before it stay, and nothing of it remains."""
    with SmallDisk(trial.folder / "disk", 400) as disk:
        run = trial.run(LARGER, out_dir=disk.folder / "run")
        out_dir = disk.seen_from_here(run.out_dir)
        command = run.start(prefix=disk.prefix)
        trial.wait_for_step(command, out_dir, 2)
        _stop_during_a_save(command, out_dir)
        disk.fill()
        command.send_to_all(signal.SIGCONT)
        ended = trial.ends(command, REFUSED, within=30, after=time.monotonic() - command.started)
        trial.promise("No space left" in " ".join(ended.errors), "it ended before a save or after it")
        left = look(out_dir)
        trial.promise(not left.broken and not left.temporary, f"{left.broken + left.temporary} lie there")
        trial.promise(bool(left.whole), "no checkpoint is left")
        disk.empty()
        trial.goes_on(run, run.start(prefix=disk.prefix), out_dir)


def full_disk_between_saves(trial: Trial) -> None:
    """The space goes between two saves: the next one is not begun."""
    with SmallDisk(trial.folder / "disk", 64) as disk:
        run = trial.run({**LONG_STEPS, "checkpoint.keep_last": 4}, out_dir=disk.folder / "run")
        out_dir = disk.seen_from_here(run.out_dir)
        command = run.start(prefix=disk.prefix)
        trial.wait_for_step(command, out_dir, 1)
        disk.fill(500_000)
        trial.ends(
            command, REFUSED, within=30, says="free some space", after=time.monotonic() - command.started
        )
        disk.empty()
        trial.goes_on(run, run.start(prefix=disk.prefix), out_dir)


def sigterm(trial: Trial) -> None:
    """SIGTERM: the step ends, is saved, and the exit code is 143."""
    _stops_after_its_step(trial, signal.SIGTERM)


def sigint(trial: Trial) -> None:
    """Ctrl-C: the same, with 130."""
    _stops_after_its_step(trial, signal.SIGINT)


def sigusr1(trial: Trial) -> None:
    """What SLURM sends before a time limit: the same, with 138."""
    _stops_after_its_step(trial, signal.SIGUSR1)


def sigint_twice(trial: Trial) -> None:
    """The second Ctrl-C does not wait for the step."""
    run = trial.run(LONG_STEPS)
    command = run.start()
    trial.wait_for_step(command, run.out_dir, 1)
    kill(command.process.pid, signal.SIGINT)
    time.sleep(0.2)
    kill(command.process.pid, signal.SIGINT)
    trial.ends(command, 130, within=5, errors=0, after=time.monotonic() - command.started)
    trial.promise(not look(run.out_dir).broken, "a checkpoint is broken")
    trial.goes_on(run, run.start())


def sigterm_and_too_little_time(trial: Trial) -> None:
    """The step and the save do not end within ``trainer.grace_seconds``; the run ends without them."""
    run = trial.run({**LONG_STEPS, "trainer.grace_seconds": 0.1})
    command = run.start()
    trial.wait_for_step(command, run.out_dir, 1)
    kill(command.process.pid, signal.SIGTERM)
    trial.ends(
        command,
        143,
        within=10,
        errors=trial.devices,  # each process has its own clock
        says="trainer.grace_seconds",
        after=time.monotonic() - command.started,
    )
    trial.goes_on(run, run.start())


def stopped_rank_0(trial: Trial) -> None:
    """Rank 0, which all others meet at, is stopped."""
    _names_the_stopped_rank(trial, 0)


def stopped_rank_1(trial: Trial) -> None:
    """Rank 1 is stopped."""
    _names_the_stopped_rank(trial, 1)


def rank_stopped_for_a_while(trial: Trial) -> None:
    """A rank stands still for less than ``trainer.hang_timeout_seconds``; the run goes on."""
    run = trial.run({"trainer.hang_timeout_seconds": 20.0})
    command = run.start()
    trial.wait_for_step(command, run.out_dir, 2)
    pid = command.ranks()[1]
    kill(pid, signal.SIGSTOP)
    time.sleep(4)
    kill(pid, signal.SIGCONT)
    trial.goes_on(run, command)


def flipped_bit(trial: Trial) -> None:
    """Each file of the newest checkpoint in turn has a flipped bit: the one before it is taken, by name."""
    _passes_over_each_file(trial, {})


def flipped_bit_in_several_files(trial: Trial) -> None:
    """The same for a checkpoint whose tensors lie in several files with an index."""
    _passes_over_each_file(trial, {"checkpoint.max_file_gb": 1e-4})


def nan_and_stop(trial: Trial) -> None:
    """A loss that is not a number stops the run, which has saved nothing of it; honest data takes it to its end."""
    run = trial.run()
    command = _start_with_nan(run, str(BAD_STEP - 1))
    trial.ends(command, REFUSED, within=60, says=f"step {BAD_STEP}: the gradient is not finite")
    trial.promise(look(run.out_dir).newest == BAD_STEP - 1, "the newest checkpoint is not the one before it")
    trial.goes_on(run, run.start())


def nan_and_skip(trial: Trial) -> None:
    """The batch is left out: the step changes no weight, and the run ends well."""
    run = trial.run({"guard.action": "skip", "checkpoint.keep_last": 100})
    trial.ends(_start_with_nan(run, str(BAD_STEP - 1)), 0, within=120, errors=0)
    left = look(run.out_dir)
    before, after = (left.whole[step]["model.safetensors"] for step in (BAD_STEP - 1, BAD_STEP))
    trial.promise(before == after, "the bad step changed weights")
    after = left.whole[BAD_STEP + 1]["model.safetensors"]
    trial.promise(before != after, "the step after it changed none")
    _require_finite(trial, run.out_dir)


def nan_and_rollback(trial: Trial) -> None:
    """The run goes back to the checkpoint before, leaves the bad batch out and ends well, also when killed then."""
    run = trial.run({"guard.action": "rollback"})
    command = _start_with_nan(run, str(BAD_STEP - 1))
    trial.wait_for_step(command, run.out_dir, BAD_STEP + 5)
    command.kill_all()
    ended = trial.ends(_start_with_nan(run, str(BAD_STEP - 1)), 0, within=120, errors=0)
    trial.promise(f"step {BAD_STEP}:" not in ended.log, "the bad batch came again")
    _require_finite(trial, run.out_dir)
    alike = trial.run({"guard.action": "rollback"})
    ended = trial.ends(_start_with_nan(alike, str(BAD_STEP - 1)), 0, within=120, errors=0)
    trial.promise("going back to" in ended.log, "it did not go back")
    trial.promise(look(run.out_dir) == look(alike.out_dir), "a kill changed how it ended")
    manifest = json.loads((alike.out_dir / f"checkpoints/step-{60:08d}/manifest.json").read_text())
    trial.promise(
        manifest["data"]["skipped"] == 8, f"{manifest['data']['skipped']} samples were left out, not 8"
    )


def nan_everywhere_and_skip(trial: Trial) -> None:
    """From some batch on nothing is a number: after ``guard.max_bad_steps`` it stops."""
    run = trial.run({"guard.action": "skip", "guard.max_bad_steps": 3})
    bad = ",".join(map(str, range(BAD_STEP - 1, 60)))
    trial.ends(_start_with_nan(run, bad), REFUSED, within=60, says="guard.max_bad_steps is 3")


def infinite_weight(trial: Trial) -> None:
    """The weights to start from hold an infinity: the first step says so, and where."""
    weights = trial.folder / "weights.safetensors"
    source = trial.reference(trial.run()).out_dir / f"checkpoints/step-{60:08d}/model.safetensors"
    tensors = load_file(source)
    tensors["blocks.1.ffn.key.weight"][3, 5] = math.inf
    save_file(tensors, weights)
    run = trial.run({"model.init_from": str(weights)})
    ended = trial.ends(run.start(), REFUSED, within=60)
    trial.promise("not finite" in " ".join(ended.errors), "it does not say what is not finite")
    trial.promise(not look(run.out_dir).whole, "something was saved")


def _stops_after_its_step(trial: Trial, number: int) -> None:
    run = trial.run(LONG_STEPS)
    command = run.start()
    trial.wait_for_step(command, run.out_dir, 1)
    kill(command.process.pid, number)
    after = time.monotonic() - command.started
    ended = trial.ends(command, 128 + number, within=SAVES_WITHIN_SECONDS, errors=0, after=after)
    left = look(run.out_dir)
    trial.promise(
        f"stopping after step {left.newest} of 4" in ended.log, "the step it says is not the saved one"
    )
    trial.promise(not left.broken and not left.temporary, f"{left.broken + left.temporary} lie there")
    trial.goes_on(run, run.start())


def _names_the_stopped_rank(trial: Trial, rank: int) -> None:
    run = trial.run({"trainer.hang_timeout_seconds": 5.0, "trainer.max_steps": 300})
    command = run.start()
    trial.wait_for_step(command, run.out_dir, 2)
    kill(command.ranks()[rank], signal.SIGSTOP)
    after = time.monotonic() - command.started
    trial.ends(command, LOST, within=LOST_WITHIN_SECONDS, says=f"rank {rank}", after=after)
    trial.goes_on(run, run.start())


def _passes_over_each_file(trial: Trial, changes: dict[str, Any]) -> None:
    chance = random.Random(0)
    run = trial.run(changes)
    source = trial.reference(run).out_dir / "checkpoints"
    names = sorted(path.name for path in (source / "step-00000010").iterdir())
    trial.starts.append({"files": names})
    for name in names:
        shutil.rmtree(run.out_dir, ignore_errors=True)
        for step in ("step-00000009", "step-00000010"):
            shutil.copytree(source / step, run.out_dir / "checkpoints" / step)
        path = run.out_dir / "checkpoints/step-00000010" / name
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        ended = trial.goes_on(run, run.start())
        warnings = [line for line in ended.log.splitlines() if "passed over a damaged checkpoint" in line]
        trial.promise(len(warnings) == 1 and str(path) in warnings[0], f"{name} is not named: {warnings}")
        trial.promise(
            "going on from" in ended.log and "step-00000009" in ended.log, f"{name}: not from step 9"
        )


def _start_with_nan(run: SmallRun, batches: str) -> Command:
    paths = {"NAN_BATCHES": batches, "PYTHONPATH": str(CHECKOUT)}
    return run.start(environment=paths, script=NAN_SAMPLES)


def _require_finite(trial: Trial, out_dir: Path) -> None:
    left = look(out_dir)
    trial.promise(left.newest == 60, f"it ended at step {left.newest}")
    for name in left.whole.get(left.newest or 0, {}):
        tensors = load_file(out_dir / f"checkpoints/step-{left.newest:08d}" / name)
        is_finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        trial.promise(is_finite, f"{name} holds what is not a number")


def _stop_during_a_save(command: Command, out_dir: Path) -> None:
    """Let the processes stand still at a moment when tensors of a checkpoint are being written."""
    while command.is_running:
        if any((out_dir / "checkpoints").glob(".rwkv-train-new-*/model*")):
            command.send_to_all(signal.SIGSTOP)
            if any((out_dir / "checkpoints").glob(".rwkv-train-new-*/model*.unfinished")):
                return
            command.send_to_all(signal.SIGCONT)
        time.sleep(0.001)
