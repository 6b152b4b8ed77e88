"""An exported state in the PyPI package ``rwkv``: the index order of the official files, and their names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoints.states import read_state_file, save_official_state
from rwkv_train.config.model import Rwkv5Config, Rwkv6Config, Rwkv6Ranks, Rwkv7Config
from rwkv_train.finetuning.states import export_start, learn_state
from rwkv_train.models.start import FixedStart

# A fair float32 tolerance between two correct implementations, absolute, on logits of standard deviation 2.
TOLERANCE = 5e-5
SIZES = {"n_layer": 2, "n_embd": 48, "head_size": 16, "vocab_size": 61}
CONFIGS = {
    "rwkv5": Rwkv5Config(**SIZES),
    "rwkv6": Rwkv6Config(**SIZES, lora_ranks=Rwkv6Ranks(shift=4, decay=6)),
    "rwkv7": Rwkv7Config(**SIZES),
}
TOKENS = torch.randint(0, 61, (24,), generator=torch.Generator().manual_seed(7))


def model_with_state(random_model, arch):
    model = random_model(CONFIGS[arch])
    learn_state(model)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for layer in model.start.layers:
            layer.wkv.copy_(torch.randn(layer.wkv.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def package_logits(tmp_path_factory):
    """Logits of the package, computed by one process for RWKV-7 and one for the older."""
    root = tmp_path_factory.mktemp("states")
    results = {}

    def compute(arch, random_model):
        if arch not in results:
            together = ["rwkv7"] if arch == "rwkv7" else ["rwkv5", "rwkv6"]
            for name in together:
                (root / name).mkdir()
                torch.save(random_model(CONFIGS[name]).state_dict(), root / name / "model.pth")
                torch.save(TOKENS, root / name / "tokens.pt")
                state = export_start(model_with_state(random_model, name))
                save_official_state(root / name / "state.pth", state)
            script = Path(__file__).with_name("run_pypi_states.py")
            done = subprocess.run(
                [sys.executable, script, str(int(arch == "rwkv7")), *(root / name for name in together)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            results.update({name: torch.load(root / name / "logits.pt") for name in together})
        return results[arch], root / arch / "state.pth"

    return compute


@pytest.mark.parametrize("arch", CONFIGS)
def test_an_exported_state_gives_the_logits_of_the_learned_one(random_model, package_logits, arch):
    theirs, _ = package_logits(arch, random_model)

    ours = model_with_state(random_model, arch)(TOKENS[None]).logits[0]

    assert (ours[0] - random_model(CONFIGS[arch])(TOKENS[None]).logits[0, 0]).abs().amax() > 0.1
    torch.testing.assert_close(theirs["parallel"], ours, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(theirs["last"], ours[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_state_that_the_package_reads_is_read_the_same(random_model, package_logits, arch):
    theirs, path = package_logits(arch, random_model)
    model = random_model(CONFIGS[arch])
    model.start = FixedStart(read_state_file(path, model.config))
    torch.testing.assert_close(theirs["parallel"], model(TOKENS[None]).logits[0], atol=TOLERANCE, rtol=0)
