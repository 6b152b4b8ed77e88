"""``python -m tests.campaigns NAME``: a long trial, outside the suite, whose results go to benchmarks/results."""

import argparse
import logging
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

from tests.campaigns import corrupt, faults, inputs, kill, prepare
from tests.campaigns.record import Record
from tests.campaigns.runs import CHECKOUT

logger = logging.getLogger("tests.campaigns")


def run_kill(record: Record, work: Path, n_kills: int, workers: int) -> None:
    """Run cases until there were so many kills."""
    trial = kill.KillTrial(work)
    rounds = kill.cases()
    while (missing := n_kills - sum(len(row["kills"]) for row in record.rows)) > 0:
        # A case has three kills at most, so that many cases cannot be too many.
        planned = list(islice((case for case in rounds if not record.has(case.seed)), -(-missing // 3)))
        with ThreadPoolExecutor(workers) as pool:
            for done in as_completed(pool.submit(trial.run, case) for case in planned):
                record.add(done.result())


def run_prepare(record: Record, work: Path, n_kills: int) -> None:
    """Run cases until there were so many kills."""
    trial = prepare.PrepareTrial(work)
    for case in prepare.cases():
        if sum(len(row["kills"]) for row in record.rows) >= n_kills:
            break
        if not record.has(case.seed):
            record.add(trial.run(case))


def run_faults(record: Record, work: Path, workers: int) -> None:
    """Try each fault that was not tried yet."""
    trial = faults.FaultsTrial(work)
    with ThreadPoolExecutor(workers) as pool:
        missing = [fault for fault in faults.faults() if not record.has(fault.name)]
        for done in as_completed(pool.submit(trial.run, fault) for fault in missing):
            record.add(done.result())


def run_corrupt(record: Record, work: Path) -> None:
    """Try each format that was not tried yet."""
    trial = corrupt.CorruptTrial(work)
    for name in corrupt.FORMATS:
        if not record.has(name):
            record.add(trial.run(name))


def run_inputs(record: Record, work: Path) -> None:
    """Try each kind of input that was not tried yet."""
    trial = inputs.InputsTrial(work)
    for name in inputs.FORMATS:
        if not record.has(name):
            record.add(trial.run(name))


def main() -> int:
    """Run what the command line names; return 1 if something was not as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("name", choices=["kill", "faults", "corrupt", "inputs", "prepare"])
    parser.add_argument("--kills", type=int, help="how many kills there are to be (kill: 200, prepare: 50)")
    parser.add_argument("--workers", type=int, help="cases at a time (kill: 2, faults: 1)")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/campaign-NAME.json)")
    parser.add_argument("--work", type=Path, help="folder for the runs (runs/campaigns/NAME)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    output = given.output or CHECKOUT / f"benchmarks/results/campaign-{given.name}.json"
    work = given.work or CHECKOUT / f"runs/campaigns/{given.name}"
    command = f"make campaign NAME={given.name}"
    if given.name == "kill":
        record = Record(output, command, "seed", kill.totals)
        run_kill(record, work, given.kills or 200, given.workers or 2)
    elif given.name == "prepare":
        record = Record(output, command, "seed", prepare.totals)
        run_prepare(record, work, given.kills or 50)
    elif given.name == "corrupt":
        record = Record(output, command, "name", corrupt.totals)
        run_corrupt(record, work)
    elif given.name == "inputs":
        record = Record(output, command, "name", inputs.totals)
        run_inputs(record, work)
    else:
        record = Record(output, command, "name", faults.totals)
        run_faults(record, work, given.workers or 1)
    logger.info("%s: %s", output, record.totals)
    return 0 if record.is_as_promised else 1


if __name__ == "__main__":
    sys.exit(main())
