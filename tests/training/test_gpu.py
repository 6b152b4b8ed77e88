"""The main job on a GPU: the same losses as on the CPU, resume, precision, evaluation, generation."""

import csv

import pytest
import torch

from rwkv_train.checkpoints import list_training_checkpoints, load_model, load_training_checkpoint
from rwkv_train.data.stored import load_corpus
from rwkv_train.evaluation.perplexity import evaluate_tokens
from rwkv_train.generation.generate import generate
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.run import run_pretraining

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RWKV4 = {"arch": "rwkv4", "n_layer": 2, "n_embd": 32, "vocab_size": 257, "ctx_len": 16}


def losses(summary):
    with (summary.out_dir / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.fixture(params=["rwkv7", "rwkv6", "rwkv5", "rwkv4"])
def any_arch(request, tree):
    if request.param != "rwkv7":
        tree["model"] = {**RWKV4, "arch": request.param}
    if request.param in {"rwkv5", "rwkv6"}:
        tree["model"]["head_size"] = 16
    return request.param


@pytest.mark.usefixtures("any_arch")
@pytest.mark.parametrize("documents", ["stream", "reset"])
def test_a_gpu_gives_the_losses_of_a_cpu(settings, tmp_path, documents):
    changes = {"data.documents": documents}
    cpu = run_pretraining(settings(changes | {"trainer.out_dir": str(tmp_path / "cpu")}))
    changes |= {"trainer.out_dir": str(tmp_path / "gpu"), "trainer.accelerator": "gpu"}
    gpu = run_pretraining(settings(changes))

    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-3)
    assert gpu.validation.loss == pytest.approx(cpu.validation.loss, rel=1e-3)


@pytest.mark.usefixtures("any_arch")
@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16-params"])
def test_bfloat16_learns_what_float32_learns(settings, tmp_path, precision):
    changes = {"trainer.accelerator": "gpu", "trainer.max_steps": 30}
    fp32 = run_pretraining(settings({**changes, "trainer.out_dir": str(tmp_path / "fp32")}))
    changes |= {"trainer.precision": precision, "trainer.out_dir": str(tmp_path / "bf16")}
    bf16 = run_pretraining(settings(changes))

    assert bf16.validation.loss == pytest.approx(fp32.validation.loss, rel=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in final_state(bf16).weights.values())


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3"])
def test_every_strategy_learns_the_same_on_one_gpu(settings, tmp_path, strategy, offload):
    if offload != "none" and "deepspeed" not in strategy:
        pytest.skip("only DeepSpeed offloads")
    plain = run_pretraining(
        settings({"trainer.accelerator": "gpu", "trainer.out_dir": str(tmp_path / "plain")})
    )
    changes = {"trainer.strategy": strategy, "trainer.offload": offload}
    shared = run_pretraining(settings(changes | {"trainer.out_dir": str(tmp_path / "shared")}))

    assert losses(shared) == pytest.approx(losses(plain), rel=1e-3)
    for name, weight in final_state(plain).weights.items():
        torch.testing.assert_close(final_state(shared).weights[name], weight, rtol=1e-2, atol=1e-4)


def test_a_compiled_model_learns_the_same(settings, tmp_path):
    plain, compiled = (
        run_pretraining(
            settings(
                {
                    "trainer.accelerator": "gpu",
                    "trainer.compile": is_compiled,
                    "trainer.out_dir": str(tmp_path / str(is_compiled)),
                }
            )
        )
        for is_compiled in (False, True)
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)


def final_state(summary):
    return load_training_checkpoint(list_training_checkpoints(summary.out_dir)[-1])


def test_a_run_goes_on_with_its_optimizer(settings, tmp_path):
    changes = {"trainer.accelerator": "gpu", "optim.lr_final": 3e-3, "optim.schedule": "constant"}
    undisturbed = run_pretraining(settings({**changes, "trainer.out_dir": str(tmp_path / "a")}))
    changes["trainer.out_dir"] = str(tmp_path / "b")
    run_pretraining(settings({**changes, "trainer.max_steps": 5}))
    resumed = run_pretraining(settings({**changes, "trainer.max_steps": 12}))

    one, other = final_state(undisturbed), final_state(resumed)
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        left, right = getattr(one, kind), getattr(other, kind)
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("any_arch")
def test_a_checkpoint_evaluates_and_generates_on_a_gpu_as_on_a_cpu(settings, corpus):
    summary = run_pretraining(settings())
    tokenizer = load_tokenizer("bytes")
    nats, texts = [], []
    for device in ("cpu", "cuda"):
        model, _ = load_model(summary.out_dir, device=device)
        documents = load_corpus(corpus / "valid").token_documents()
        nats.append(evaluate_tokens(model, documents).total.nats)
        pieces = generate(model, tokenizer, "state ", SamplingSettings(temperature=0), max_tokens=20, seed=0)
        texts.append("".join(pieces))

    assert nats[0] == pytest.approx(nats[1], rel=1e-4)
    assert texts[0] == texts[1]
