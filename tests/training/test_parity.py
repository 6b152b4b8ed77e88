"""Every strategy, number of processes and precision learns what plain training learns."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoints import load_training_checkpoint
from rwkv_train.config.load import check_tree
from rwkv_train.data.stored import load_corpus
from rwkv_train.models.registry import build_model, initialize
from tests import forks

JOB = Path(__file__).with_name("parity_job.py")
PATIENCE_SECONDS = 240
BATCH = 12
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
NEEDS_DEEPSPEED = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
STRATEGIES = ["ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3"]
STRATEGY = pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=NEEDS_DEEPSPEED if "deepspeed" in name else ()) for name in STRATEGIES],
)
CHAIN = [
    ("deepspeed_1", 2, 2),
    ("deepspeed_3", 1, 4),
    ("ddp", 3, 6),
    ("auto", 1, 8),
]  # strategy, processes, last step

FLOAT32 = {"rel": 2e-5}  # sums in another order, over steps
BFLOAT16 = {"rel": 2e-3}  # half a unit of bfloat16's last place


class Runs:
    """Runs that the tests of this file share, in one folder."""

    def __init__(self, folder, corpus):
        self.folder = folder
        self.corpus = corpus

    def tree(self, name, devices=1, **trainer):
        """Settings of a run of a second, whose steps do not depend on its length."""
        return {
            "model": {
                "arch": "rwkv7",
                "n_layer": 2,
                "n_embd": 32,
                "head_size": 16,
                "lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8},
                "vocab_size": 257,
                "ctx_len": 16,
            },
            "data": {"train": str(self.corpus / "train"), "valid": None, "tokenizer": "bytes"},
            "optim": {"lr": 3e-3, "lr_final": 3e-3, "schedule": "constant", "warmup_steps": 2},
            "trainer": {
                "out_dir": str(self.folder / name),
                "max_steps": 4,
                "global_batch_size": BATCH,
                "micro_batch_size": 2,
                "accelerator": "cpu",
                "log_every_n_steps": 1,
                "devices": devices,
                **trainer,
            },
            "checkpoint": {"every_n_steps": 2},
        }

    def train(self, world_size, trees, resume=()):
        """Run ``trees`` one after the other in ``world_size`` processes.

        ``resume`` says of some names which path a run goes on from; the others go on from their own checkpoints.
        """
        path = self.folder / "job.json"
        starts = dict(resume)
        path.write_text(
            json.dumps([[tree, starts.get(Path(tree["trainer"]["out_dir"]).name, "auto")] for tree in trees])
        )
        logs = [self.folder / f"log-{world_size}-{rank}.txt" for rank in range(world_size)]
        if world_size == 1:
            processes = [forks.start([JOB, path], logs[0], {"OMP_NUM_THREADS": "1"})]
        else:
            processes = forks.start_ranks([[JOB, path]] * world_size, logs)
        codes = forks.end(processes, PATIENCE_SECONDS)
        # Of all: the one that failed first ends the others.
        assert not any(codes), "\n".join([str(codes), *(log.read_text()[-8000:] for log in logs)])

    def metric(self, name, column):
        """Return one value a step."""
        with (self.folder / name / "metrics.csv").open(newline="") as file:
            return [float(row[column]) for row in csv.DictReader(file)]

    def path(self, name, step=4):
        """Return where a run leaves the checkpoint of a step."""
        return self.folder / name / f"checkpoints/step-{step:08d}"

    def checkpoint(self, name, step=4):
        """Return everything that a checkpoint holds."""
        return load_training_checkpoint(self.path(name, step))

    def samples(self, name, n_steps, rank=0):
        """Return the numbers of the samples that a process read on its way to step ``n_steps``."""
        return json.loads((self.folder / name / f"samples-{n_steps}-{rank}.json").read_text())


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """All runs of this file: few processes, as each takes seconds to start."""
    made = Runs(tmp_path_factory.mktemp("parity"), corpus)
    strategies = [name for name in STRATEGIES if HAS_DEEPSPEED or "deepspeed" not in name]
    bf16 = {"precision": "bf16-params"}
    trees = {1: [], 2: []}
    half_way = {}

    for name in strategies:
        trees[2].append(made.tree(f"2-{name}", 2, strategy=name))
        cheap = {"strategy": name, "grad_checkpointing": True, **bf16}
        trees[2].append(made.tree(f"2-{name}-bf16", 2, **cheap))
        trees[2].append(made.tree(f"2-{name}-bf16-resumed", 2, **cheap))
        half_way[f"2-{name}-bf16-resumed"] = str(made.path(f"2-{name}-bf16", 2))
        trees[1].append(made.tree(f"1-{name}", strategy=name))
        trees[1].append(made.tree(f"1-{name}-autocast", strategy=name, precision="bf16-autocast"))
    trees[1] += [
        made.tree("plain", max_steps=8),
        made.tree("plain-bf16", **bf16),
        made.tree("plain-autocast", precision="bf16-autocast"),
        made.tree("4-times-2", global_batch_size=8),
        made.tree("8-at-once", global_batch_size=8, micro_batch_size=8),
    ]
    chain = CHAIN if HAS_DEEPSPEED else []
    links = [made.tree("chain", devices, strategy=name, max_steps=end) for name, devices, end in chain]
    made.train(2, trees[2] + links[:1], half_way)
    made.train(1, trees[1] + links[1:2])
    if links:
        made.train(3, links[2:3])
        made.train(1, links[3:])
    return made


def by_hand(runs):
    """Return loss and norm of the gradient of the first step: the whole batch at once, in float64."""
    spec = importlib.util.spec_from_file_location("parity_job", JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    config = check_tree(runs.tree("plain"))
    samples = job.SamplesWithHoles(load_corpus(runs.corpus / "train"), config)
    model = build_model(config.model, wkv_backend="reference")
    initialize(model, config.trainer.seed)
    model.double()
    tokens, targets = (torch.stack(part) for part in zip(*map(samples.read, range(BATCH)), strict=True))
    logits = model(tokens).logits
    valid = targets != -100
    assert len(set(valid.sum(dim=1).tolist())) > 4  # micro-batches differ
    losses = -torch.log_softmax(logits, -1)[valid].gather(1, targets[valid].unsqueeze(1))
    penalties = logits[valid].max(dim=1).values.square() / 2
    (losses.mean() + config.optim.l2wrap * penalties.mean()).backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return losses.mean().item(), torch.cat(grads).norm().item()


def assert_same_state(one, other):
    """Weights and both moments are equal, bit for bit."""
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        left, right = getattr(one, kind), getattr(other, kind)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), kind


def test_loss_and_gradient_of_a_step_are_means_over_all_its_valid_targets(runs):
    loss, norm = by_hand(runs)
    assert runs.metric("plain", "loss")[0] == pytest.approx(loss, rel=1e-6)
    assert runs.metric("plain", "grad_norm")[0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("column", ["loss", "grad_norm"])
def test_four_micro_batches_of_two_are_a_batch_of_eight(runs, column):
    at_once = runs.metric("8-at-once", column)
    assert runs.metric("4-times-2", column) == pytest.approx(at_once, **FLOAT32)


@STRATEGY
@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize("column", ["loss", "grad_norm"])
def test_a_strategy_learns_what_plain_training_learns(runs, strategy, n_processes, column):
    found = runs.metric(f"{n_processes}-{strategy}", column)
    assert found == pytest.approx(runs.metric("plain", column)[:4], **FLOAT32)


@STRATEGY
def test_two_processes_share_the_samples_of_each_step(runs, strategy):
    read = [runs.samples(f"2-{strategy}", 4, rank) for rank in (0, 1)]
    half = BATCH // 2
    for step in range(4):
        both = [sample for one in read for sample in one[step * half : (step + 1) * half]]
        assert sorted(both) == list(range(step * BATCH, (step + 1) * BATCH))


@STRATEGY
def test_autocast_is_the_same_under_every_strategy(runs, strategy):
    found = runs.metric(f"1-{strategy}-autocast", "loss")
    assert found == pytest.approx(runs.metric("plain-autocast", "loss"), **BFLOAT16)


@STRATEGY
@pytest.mark.parametrize("column", ["loss", "grad_norm"])
def test_bfloat16_parameters_and_recomputed_blocks_are_the_same_under_every_strategy(runs, strategy, column):
    found = runs.metric(f"2-{strategy}-bf16", column)
    assert found == pytest.approx(runs.metric("plain-bf16", column), **BFLOAT16)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_bfloat16_stays_close_to_float32(runs, precision):
    found = runs.metric(f"plain-{precision}", "loss")
    exact = runs.metric("plain", "loss")[:4]
    assert found != exact
    assert found == pytest.approx(exact, rel=1e-2)


@STRATEGY
def test_masters_are_float32_where_the_forward_sees_bfloat16(runs, strategy):
    weights = runs.checkpoint(f"2-{strategy}-bf16").weights
    rounded = {name for name, weight in weights.items() if torch.equal(weight.bfloat16().float(), weight)}
    exact = runs.checkpoint("plain", 8).weights
    as_they_start = {name for name, w in exact.items() if torch.equal(w.bfloat16().float(), w)}
    assert rounded <= as_they_start


@STRATEGY
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(runs, strategy):
    undisturbed = runs.checkpoint(f"2-{strategy}-bf16")
    assert_same_state(runs.checkpoint(f"2-{strategy}-bf16-resumed"), undisturbed)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("column", ["loss", "grad_norm"])
def test_a_run_that_changes_strategy_and_processes_at_each_resumption_learns_the_same(runs, column):
    assert runs.metric("chain", column) == pytest.approx(runs.metric("plain", column), **FLOAT32)


@NEEDS_DEEPSPEED
def test_such_a_run_reads_the_same_samples_in_the_same_order(runs):
    start = 0
    for _, n_processes, end in CHAIN:
        read = [runs.samples("chain", end, rank) for rank in range(n_processes)]
        share = BATCH // n_processes
        for step in range(start, end):
            first = (step - start) * share
            together = [sample for one in read for sample in one[first : first + share]]
            assert sorted(together) == runs.samples("plain", 8)[step * BATCH : (step + 1) * BATCH]
        start = end
