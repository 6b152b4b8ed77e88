"""A few cases of each campaign, by the same code."""

import sys

import pytest

from tests.campaigns import faults_at_start, faults_while_running
from tests.campaigns.corrupt import FORMATS, CorruptTrial
from tests.campaigns.disk import can_mount
from tests.campaigns.faults import Fault, FaultsTrial
from tests.campaigns.inputs import FORMATS as INPUT_FORMATS
from tests.campaigns.inputs import InputsTrial
from tests.campaigns.kill import Case, KillTrial, Moment
from tests.campaigns.prepare import Case as PrepareCase
from tests.campaigns.prepare import Moment as PrepareMoment
from tests.campaigns.prepare import PrepareTrial
from tests.campaigns.record import AS_PROMISED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.mark.parametrize(
    ("kind", "strategy", "moments"),
    [
        # Three starts of a process that loads everything, or six; tests/training/test_processes.py kills, also in a
        # save, processes that have it loaded.
        pytest.param("one", "auto", (Moment("save", 0.3, 0.002, 0),), marks=pytest.mark.slow),
        pytest.param("rank", "ddp", (Moment("step", 0.3, 0.01, 1),), marks=pytest.mark.slow),
    ],
    ids=["the only process", "rank 1 of 2"],
)
def test_a_killed_run_goes_on_to_the_undisturbed_end(tmp_path, kind, strategy, moments):
    row = KillTrial(tmp_path).run(Case(0, kind, strategy, moments))
    assert row["outcome"] == AS_PROMISED
    assert len(row["kills"]) == len(moments)


@pytest.mark.parametrize(
    ("try_it", "devices"),
    [
        (faults_at_start.world_size_that_does_not_divide, 2),
        # Each loads everything several times. The same in one process, or in two that have it loaded:
        # test_full_disk.py and test_guard.py of tests/training, tests/commands/test_main_launch.py.
        pytest.param(
            faults_at_start.full_disk,
            1,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not can_mount(), reason="no tmpfs can be mounted (unshare, nsenter)"),
            ],
        ),
        pytest.param(faults_at_start.rank_with_an_invalid_config, 2, marks=pytest.mark.slow),
        pytest.param(faults_while_running.nan_and_skip, 1, marks=pytest.mark.slow),
    ],
    ids=["batch of three", "full disk", "invalid on rank 1", "nan"],
)
def test_a_fault_is_answered_as_promised(tmp_path, try_it, devices):
    row = FaultsTrial(tmp_path, is_timed=False).run(Fault(try_it, devices))
    assert row["outcome"] == AS_PROMISED


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_checkpoints_are_refused_or_read_right(tmp_path, name):
    row = CorruptTrial(tmp_path).run(name, n_variants=8)
    assert row["outcome"] == AS_PROMISED
    assert row["ends"]["refused"] > 0


@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_damaged_inputs_are_refused_counted_or_valid(tmp_path, name):
    row = InputsTrial(tmp_path).run(name, n_variants=10)
    assert row["outcome"] == AS_PROMISED
    assert set(row["ends"]) != {"still valid"}


def test_a_killed_preparation_goes_on_to_the_undisturbed_end(tmp_path):
    moments = (PrepareMoment("reading", 0.05), PrepareMoment("choosing", 0.1))
    row = PrepareTrial(tmp_path, megabytes=3, tokenizer="bytes").run(PrepareCase(0, "parent", moments))
    assert row["outcome"] == AS_PROMISED
    assert len(row["kills"]) == 2
