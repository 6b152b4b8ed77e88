"""``data.documents: reset``: a step is that of the documents alone, and corpora without end tokens are refused."""

import json

import numpy as np
import pytest
import torch

from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.module import MicroBatches, Position
from rwkv_train.errors import ConfigError, DataError
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.training.corpora import open_corpora, open_samples
from rwkv_train.training.engine import Engine
from rwkv_train.training.guard import Guard
from rwkv_train.training.loggers import METRICS_FILE, read_metrics
from rwkv_train.training.module import TrainingModule
from rwkv_train.training.objective import NextTokenLoss
from rwkv_train.training.run import run_pretraining
from rwkv_train.training.schedule import run_length

SIZES = {"n_layer": 2, "n_embd": 32, "vocab_size": 257, "ctx_len": 16}
MODELS = {
    "rwkv4": {"arch": "rwkv4"},
    "rwkv5": {"arch": "rwkv5", "head_size": 16},
    "rwkv6": {"arch": "rwkv6", "head_size": 16},
    "rwkv7": {"arch": "rwkv7", "head_size": 16, "lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8}},
}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A corpus of documents of 0 to 11 tokens: most samples hold several, some a whole one of no token."""
    prefix = tmp_path_factory.mktemp("documents") / "short"
    generator = np.random.default_rng(5)
    with TokenFileWriter(prefix, np.uint16) as writer:
        for _ in range(150):
            tokens = generator.integers(1, 257, generator.integers(0, 12))
            writer.add_document(np.append(tokens, 0).astype(np.uint16))
    return prefix


@pytest.fixture
def short_documents(tree, short):
    tree["data"] |= {"train": str(short), "documents": "reset"}
    return tree


def perturbed(model):
    """Give every parameter its say: some are zero at first, and hide what is behind them."""
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def pieces(batch, ctx_len):
    """The parts of a packed micro-batch that begin with a sample or an end token, found by a loop."""
    tokens, targets = batch.tokens.flatten().tolist(), batch.targets.flatten().tolist()
    starts = [place for place, token in enumerate(tokens) if place % ctx_len == 0 or token == 0]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield torch.tensor([tokens[start:end]]), torch.tensor([targets[start:end]])


@pytest.mark.parametrize("arch", MODELS)
def test_a_packed_step_has_the_loss_and_gradients_of_its_documents_alone(short_documents, settings, arch):
    short_documents["model"] = {**SIZES, **MODELS[arch]}
    config = settings({"trainer.micro_batch_size": 4, "optim.l2wrap": 0.0})
    samples = open_samples(config, open_corpora(config))
    batch = MicroBatches(samples, config, 0, Position(0), 1, end_of_document=0)[0]
    model = perturbed(build_model(config.model, wkv_backend="reference"))
    length = run_length(config.trainer, config.model.ctx_len, 0)
    module = TrainingModule(
        model, Engine(model, config), config, length, Position(0), Guard(config.guard), NextTokenLoss()
    )
    share = module.training_step(batch, 0)
    share.backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad(set_to_none=True)
    nats = [model(tokens, targets=targets).losses.sum() for tokens, targets in pieces(batch, 16)]
    assert len(nats) > 2 * config.trainer.micro_batch_size
    alone = sum(nats) / (8 * 16) * config.trainer.accumulation  # 8 samples a step, over its two micro-batches
    alone.backward()

    assert share.item() == pytest.approx(alone.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)


def losses(summary):
    return [float(row["loss"]) for row in read_metrics(summary.out_dir / METRICS_FILE) if row["loss"]]


@pytest.fixture(scope="module")
def made_once():
    """Filled by the first test that needs it: its settings are made for each test anew."""
    return []


@pytest.fixture
def plain_losses(short_documents, settings, tmp_path, made_once):
    """Those of a run by one process with nothing special."""
    short_documents["data"]["valid"] = None
    short_documents["trainer"] |= {"max_steps": 4, "log_every_n_steps": 1}
    if not made_once:
        made_once += losses(run_pretraining(settings({"trainer.out_dir": str(tmp_path / "plain")})))
    assert len(made_once) == 4
    return made_once


@pytest.mark.parametrize(
    ("name", "value"),
    [("strategy", "fsdp2"), ("strategy", "deepspeed_3"), ("grad_checkpointing", True)],
    ids=["fsdp2", "zero 3", "recomputed"],
)
def test_every_strategy_trains_on_packed_documents_alike(plain_losses, settings, name, value):
    other = run_pretraining(settings({f"trainer.{name}": value}))
    # float32 sums in another order; a document that saw its neighbour would differ in the third digit.
    assert losses(other) == pytest.approx(plain_losses, rel=1e-5)


def test_documents_reset_and_streamed_are_not_the_same(plain_losses, settings):
    streamed = run_pretraining(settings({"data.documents": "stream"}))
    assert losses(streamed) != pytest.approx(plain_losses, rel=1e-4)


def test_documents_without_their_end_token_are_refused(short_documents, settings, tmp_path):
    with TokenFileWriter(tmp_path / "endless", np.uint16) as writer:
        for number in range(20):
            writer.add_document(np.array([5, 6, 7 if number == 13 else 0], np.uint16))
    with pytest.raises(DataError, match=r"endless: document 13 ends with the token 7, but .* end token 0"):
        open_corpora(settings({"data.train": str(tmp_path / "endless")}))
    assert open_corpora(settings({"data.documents": "stream"})).train_tokens == 60


def test_a_run_goes_on_with_the_documents_as_they_were(short_documents, settings):
    short_documents["trainer"] |= {"max_steps": 4, "sample_tokens": 0}
    summary = run_pretraining(settings())
    manifest = json.loads((summary.checkpoint / "manifest.json").read_text())
    assert manifest["config"]["data"]["documents"] == "reset"
    with pytest.raises(ConfigError, match=r"data\.documents is 'stream' but 'reset' in"):
        run_pretraining(settings({"data.documents": "stream", "trainer.max_steps": 5}))
