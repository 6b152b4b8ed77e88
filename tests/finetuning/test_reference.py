"""Pairs in packed rows, and the file that keeps what the model before the run says of them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_train.config.model import Rwkv4Config
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.rows import fill_pair_row
from rwkv_train.data.instruct.tokens import Run, tokenize
from rwkv_train.errors import CheckpointError
from rwkv_train.finetuning.preferences import PairValues, dpo_loss, sequence_log_probs
from rwkv_train.finetuning.reference import (
    ReferenceLogProbs,
    compute_reference,
    fingerprint_of,
    load_reference,
    save_reference,
)
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.ops.context import packed_context
from rwkv_train.tokenizers import load_tokenizer

TEXTS = [
    ("ask", "good", "no"),
    ("a much longer question", "yes", "no, and that at length"),
    ("x", "y", "z"),
    ("why", "because", "so"),
]


def pairs():
    tokenizer = load_tokenizer("bytes")
    return [
        PreferencePair(
            f"row {number}",
            *(
                tokenize("", [Run(prompt, is_learned=False), Run(answer, is_learned=True)], tokenizer)
                for answer in answers
            ),
        )
        for number, (prompt, *answers) in enumerate(TEXTS)
    ]


def model():
    built = build_model(Rwkv4Config(n_layer=2, n_embd=32, vocab_size=257), wkv_backend="reference")
    initialize(built, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built.double()


def losses_of(built):
    def run(tokens, targets, cu_seqlens):
        context = packed_context(cu_seqlens)
        state = built.zero_state(len(cu_seqlens) - 1, dtype=torch.float64)
        return built(tokens, state, targets, context).losses

    return run


def alone(built, side):
    """Sum of the answer's log-probabilities, of one conversation without padding or neighbours."""
    inputs, targets = (torch.from_numpy(x) for x in side.inputs_and_targets())
    state = built.zero_state(1, dtype=torch.float64)
    scores = built(inputs[None], state).logits[0].log_softmax(-1)
    return sum(scores[place, target] for place, target in enumerate(targets) if target != -100)


def test_answers_in_packed_rows_have_the_log_probability_that_they_have_alone():
    built, numbers = model(), [3, 1, 0]  # not all of them, and in an order of their own
    values = compute_reference(losses_of(built), pairs(), numbers, 80)

    chosen = [alone(built, pairs()[number].chosen).item() for number in numbers]
    rejected = [alone(built, pairs()[number].rejected).item() for number in numbers]
    assert values.chosen.tolist() == pytest.approx(chosen, rel=1e-6)  # they are rounded to float32 at the end
    assert values.rejected.tolist() == pytest.approx(rejected, rel=1e-6)
    assert values.chosen.dtype == torch.float32


def test_the_gradient_of_packed_pairs_is_the_sum_of_theirs_alone():
    built = model()
    row = fill_pair_row(pairs()[2:], 64)
    tokens, targets, cu_seqlens = map(torch.from_numpy, row[:3])
    sums, _ = sequence_log_probs(
        losses_of(built)(tokens[None], targets[None], cu_seqlens), targets[None], cu_seqlens
    )
    zeros = PairValues(torch.zeros(2), torch.zeros(2))
    loss = dpo_loss(PairValues(sums[row.chosen], sums[row.rejected]), zeros, beta=0.5)
    packed = torch.autograd.grad(loss.losses.sum(), built.emb.weight)[0]

    margins = [0.5 * (alone(built, pair.chosen) - alone(built, pair.rejected)) for pair in pairs()[2:]]
    wanted = torch.autograd.grad(
        sum(torch.log1p(torch.exp(-margin)) for margin in margins), built.emb.weight
    )[0]
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(packed, wanted, rtol=1e-9, atol=1e-12)


def test_a_process_without_a_share_gives_none():
    values = compute_reference(losses_of(model()), pairs(), [], 80)
    assert [x.shape for x in values] == [(0,), (0,)]


def reference():
    first = PairValues(torch.tensor([-1.0, -2.5]), torch.tensor([-3.0, -0.5]))
    second = PairValues(torch.tensor([-7.0]), torch.tensor([-8.0]))
    return ReferenceLogProbs((first, second), data="d1", base="b1")


def test_the_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "reference.safetensors"
    assert load_reference(path, data="d1", base="b1") is None

    save_reference(path, reference())
    read = load_reference(path, data="d1", base="b1")

    assert (read.data, read.base) == ("d1", "b1")
    assert [[x.tolist() for x in dataset] for dataset in read.datasets] == [
        [[-1.0, -2.5], [-3.0, -0.5]],
        [[-7.0], [-8.0]],
    ]
    assert sorted(load_file(path)) == ["0.chosen", "0.rejected", "1.chosen", "1.rejected"]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_values_of_more_than_ten_datasets_keep_their_order(tmp_path):
    path = tmp_path / "reference.safetensors"
    datasets = tuple(PairValues(torch.tensor([float(n)]), torch.tensor([-float(n)])) for n in range(12))
    save_reference(path, ReferenceLogProbs(datasets, "d1", "b1"))
    read = load_reference(path, data="d1", base="b1")
    assert [float(dataset.chosen) for dataset in read.datasets] == list(range(12))


@pytest.mark.parametrize(
    ("data", "base", "message"),
    [
        ("d2", "b1", r"belongs to other pairs \(d1, and the run has d2\)"),
        ("d1", "b2", r"belongs to another model \(b1, and the run has b2\)"),
    ],
)
def test_a_file_of_other_data_or_another_base_is_refused(tmp_path, data, base, message):
    save_reference(tmp_path / "r.safetensors", reference())
    with pytest.raises(CheckpointError, match=message):
        load_reference(tmp_path / "r.safetensors", data=data, base=base)


@pytest.mark.parametrize("content", ["noise", "other tensors", "cut off"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "r.safetensors"
    if content == "noise":
        path.write_bytes(b"\x00" * 40)
    elif content == "other tensors":
        save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, path)
    else:
        save_reference(path, reference())
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"delete it, and (it is|they are) computed again"):
        load_reference(path, data="d1", base="b1")


def test_the_fingerprint_is_that_of_every_token_mask_and_place():
    one = pairs()
    changed = one[0].chosen.tokens.copy()
    changed[2] += 1
    mask = ~one[0].chosen.is_learned
    others = [
        [one[1:], one[:1]],  # the same pairs in other datasets
        [one[:1], one[1:]],
        [one[::-1]],
        [[one[0]._replace(chosen=one[0].rejected, rejected=one[0].chosen), *one[1:]]],
        [[one[0]._replace(chosen=one[0].chosen._replace(tokens=changed)), *one[1:]]],
        [[one[0]._replace(chosen=one[0].chosen._replace(is_learned=mask)), *one[1:]]],
    ]
    prints = [fingerprint_of([one]), *map(fingerprint_of, others)]
    assert len(set(prints)) == len(prints)
    wider = [
        pair._replace(chosen=pair.chosen._replace(tokens=pair.chosen.tokens.astype(np.int64))) for pair in one
    ]
    assert fingerprint_of([wider]) == prints[0] == fingerprint_of([pairs()])
