from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv7Config
from rwkv_train.data.instruct.rows import Part, Row, fill_row, pack
from rwkv_train.data.instruct.tokens import Run, tokenize
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.models.state import join_rows, take_rows
from rwkv_train.ops.context import packed_context
from rwkv_train.tokenizers import load_tokenizer

CONFIGS = {
    "rwkv4": Rwkv4Config(n_layer=2, n_embd=32, vocab_size=257),
    "rwkv7": Rwkv7Config(
        n_layer=2, n_embd=32, head_size=16, vocab_size=257, lora_ranks=LoraRanks(w=8, a=8, v=8, g=8)
    ),
}
FLOAT64 = 1e-10


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 20))
def test_every_position_stands_in_one_row_and_nothing_that_fits_is_divided(lengths, ctx_len):
    chains = pack(lengths, ctx_len)

    parts = sorted(part for chain in chains for row in chain for part in row.parts)
    for conversation, length in enumerate(lengths):
        own = [part for part in parts if part.conversation == conversation]
        assert [own[0].start, *(part.stop for part in own)] == [*range(0, length, ctx_len), length]
    for chain in chains:
        assert all(1 <= row.n_tokens <= ctx_len for row in chain)
        assert [row.goes_on for row in chain] == [False] + [True] * (len(chain) - 1)
        for row, following in pairwise(chain):  # the chain is one conversation, and others only at its end
            assert len(row.parts) == 1
            assert following.parts[0][:2] == (row.parts[0].conversation, row.parts[0].stop)


def test_rows_are_filled_as_well_as_they_can_be():
    # By hand: 6+4, 5+3+2, and 23 = 10 + 10 + 3 with 7 after it.
    chains = pack([3, 23, 6, 7, 4, 5, 2], 10)
    assert sorted(sorted(p.conversation for p in chain[-1].parts) for chain in chains) == [
        [0, 5, 6],
        [1, 3],
        [2, 4],
    ]
    assert [chain[0].parts[0] for chain in chains if len(chain) > 1] == [Part(1, 0, 10)]


def conversations():
    tokenizer = load_tokenizer("bytes")
    texts = [
        ("ask", "say"),
        ("a long question that goes on and on", "and so does the answer"),
        ("x", "y"),
        ("q", "rst"),
    ]
    return [tokenize("", [Run(a, is_learned=False), Run(b, is_learned=True)], tokenizer) for a, b in texts]


def test_a_filled_row_is_written_by_hand():
    row = Row((Part(2, 0, 3), Part(0, 4, 7)))
    tokens, targets, cu_seqlens = fill_row(row, conversations(), 8)

    def byte(letter):
        return ord(letter) + 1

    assert tokens.tolist() == [0, byte("x"), byte("y"), *map(byte, "say"), 0, 0]
    assert targets.tolist() == [-100, byte("y"), 0, byte("a"), byte("y"), 0, -100, -100]
    assert cu_seqlens.tolist() == [0, 3, 6, 8]


@pytest.mark.parametrize("version", CONFIGS)
def test_packed_and_in_segments_a_conversation_has_the_loss_that_it_has_alone(version):
    model = build_model(CONFIGS[version], wkv_backend="reference")
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model = model.double()
    texts = conversations()

    alone = []
    for text in texts:
        inputs, targets = (torch.from_numpy(x)[None] for x in text.inputs_and_targets())
        logits = model(inputs).logits[0]
        chosen = targets[0] != -100
        nats = -logits.log_softmax(-1)[chosen, targets[0][chosen]]
        assert len(nats) == text.n_learned
        alone.append(float(nats.detach().sum()))

    packed = [0.0] * len(texts)
    for chain in pack([text.n_inputs for text in texts], 16):
        last = None
        for row in chain:
            filled = fill_row(row, texts, 16)
            n_sequences = len(filled.cu_seqlens) - 1
            state = model.zero_state(n_sequences, dtype=torch.float64)
            if row.goes_on:
                state = join_rows([last, take_rows(state, range(1, n_sequences))])
            tokens, targets, cu_seqlens = map(torch.from_numpy, filled)
            with torch.no_grad():
                output = model(tokens[None], state, targets[None], packed_context(cu_seqlens))
            for part, losses in zip(
                row.parts, np.split(output.losses[0].numpy(), cu_seqlens[1:-1]), strict=False
            ):
                packed[part.conversation] += losses.sum()
            last = take_rows(output.state, [len(row.parts) - 1])

    assert packed == pytest.approx(alone, rel=FLOAT64)
