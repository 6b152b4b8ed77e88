"""Micro-batches: a step is the same whoever computes which part of it."""

import random
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_train.data.instruct.batches import ConversationBatches, InstructSamples, hash_of
from rwkv_train.data.instruct.pair_batches import PairBatches
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.tokens import IGNORED, TokenizedConversation
from rwkv_train.data.module import Position

CTX_LEN, LANES, N_STEPS = 16, 8, 6
BEGIN = Position(0)


def settings(world_size=1, micro_batch_size=8, names=("one",)):
    """The settings that batches look at."""
    trainer = SimpleNamespace(
        global_batch_size=LANES,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        accumulation=LANES // (world_size * micro_batch_size),
        seed=3,
    )
    datasets = [SimpleNamespace(name=name, weight=1.0) for name in names]
    data = SimpleNamespace(datasets=datasets)
    return SimpleNamespace(trainer=trainer, data=data, model=SimpleNamespace(ctx_len=CTX_LEN))


def conversation(number, longest=60):
    """A conversation of random length, of whose second half some tokens are learned."""
    generator = np.random.default_rng(number)
    length = int(generator.integers(2, longest))
    tokens = np.concatenate([[0], generator.integers(1, 257, length), [0]]).astype(np.uint16)
    is_learned = (np.arange(len(tokens)) > length // 2) & (generator.random(len(tokens)) < 0.7)
    return TokenizedConversation(f"line {number}", tokens, is_learned)


@pytest.fixture(scope="module")
def conversations():
    return [conversation(number) for number in range(40)]


def samples_of(conversations, config):
    return InstructSamples([conversations], [hash_of(conversations)], config)


def batches_of(conversations, world_size=1, micro_batch_size=8, start=BEGIN):
    """Return the batches of each rank, by step."""
    config = settings(world_size, micro_batch_size)
    per_step = config.trainer.accumulation
    ranks = []
    for rank in range(world_size):
        batches = ConversationBatches(samples_of(conversations, config), config, rank, start, N_STEPS)
        found = [batches[index] for index in range(len(batches))]
        ranks.append([found[i : i + per_step] for i in range(0, len(found), per_step)])
    return [[ranks[rank][step] for rank in range(world_size)] for step in range(N_STEPS - start.step)]


def sequences(batch):
    """The sequences of a micro-batch that hold tokens: first lane's number, tokens, targets; by their number."""
    bounds = batch.cu_seqlens.tolist()
    tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
    return [(tokens[a:b], targets[a:b]) for a, b in pairwise(bounds)]


def rows(step):
    """Tokens and targets of each lane's row in a step, by lane."""
    found = {}
    for batches in step:
        for batch in batches:
            first = batch.first_sample % LANES
            for place, (tokens, targets) in enumerate(
                zip(batch.tokens.view(-1, CTX_LEN), batch.targets.view(-1, CTX_LEN), strict=True)
            ):
                found[first + place] = (tokens.tolist(), targets.tolist())
    return [found[lane] for lane in range(LANES)]


def carries(step):
    """What comes to a lane and goes from it, each with the tokens of the sequence; by lane."""
    found = []
    for batches in step:
        for batch in batches:
            if batch.carry is not None:
                cut = sequences(batch)
                found += [("comes", lane, cut[number]) for lane, number in batch.carry.comes]
                found += [("goes", lane, cut[number]) for lane, number in batch.carry.goes]
    return sorted(found, key=lambda one: one[:2])


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 2), (2, 4), (2, 2), (4, 1), (4, 2)])
def test_a_step_is_the_same_whatever_processes_and_micro_batches(conversations, world_size, micro_batch_size):
    at_once = batches_of(conversations)
    shared = batches_of(conversations, world_size, micro_batch_size)
    for one, other in zip(at_once, shared, strict=True):
        assert rows(one) == rows(other)
        assert carries(one) == carries(other)
        assert {batch.step_targets for rank in other for batch in rank} == {one[0][0].step_targets}


def test_a_step_counts_what_is_learned_over_all_lanes(conversations):
    for step in batches_of(conversations, 2, 2):
        learned = sum(int((batch.targets != IGNORED).sum()) for rank in step for batch in rank)
        assert learned > 0
        assert {batch.step_targets for rank in step for batch in rank} == {learned}


def test_a_step_without_anything_to_learn_has_one_target():
    silent = conversation(1)._replace(is_learned=np.zeros(len(conversation(1).tokens), np.bool_))
    (batch,) = batches_of([silent])[0][0]
    assert (batch.targets == IGNORED).all()
    assert batch.step_targets == 1


def test_tokens_of_a_conversation_that_goes_on_follow_each_other(conversations):
    """Put together again by the carries alone, every text is one that was given, from its beginning."""
    texts = {tuple(one.tokens[:-1].tolist()): one.inputs_and_targets()[1].tolist() for one in conversations}
    open_texts = {}  # by lane: tokens and targets so far
    n_long = 0
    for step in batches_of(conversations, 2, 2):
        for batch in (batch for rank in step for batch in rank):
            carry = batch.carry
            comes = {} if carry is None else {number: lane for lane, number in carry.comes}
            goes = {} if carry is None else {number: lane for lane, number in carry.goes}
            for number, here in enumerate(sequences(batch)):
                before = open_texts.pop(comes[number]) if number in comes else ([], [])
                tokens, targets = (one + other for one, other in zip(before, here, strict=True))
                if number in comes:
                    n_long += number not in goes
                if number in goes:
                    open_texts[goes[number]] = (tokens, targets)
                elif set(tokens) - {0}:
                    assert texts[tuple(tokens)] == targets
                else:  # the filling, or empty
                    assert set(targets) <= {IGNORED}
    assert n_long > 5


def test_a_resumed_run_goes_on_with_the_same_batches(conversations):
    whole, rest = batches_of(conversations), batches_of(conversations, start=Position(4))
    assert list(map(rows, rest)) == list(map(rows, whole[4:]))
    assert list(map(carries, rest)) == list(map(carries, whole[4:]))


def test_a_run_that_went_back_passes_over_what_it_read_since(conversations):
    whole, rest = batches_of(conversations), batches_of(conversations, start=Position(1, 2 * LANES))
    assert list(map(rows, rest[:3])) == list(map(rows, whole[3:]))


def test_the_number_of_sequences_is_a_power_of_two(conversations):
    for step in batches_of(conversations, micro_batch_size=2):
        for batch in step[0]:
            n_sequences = len(batch.cu_seqlens) - 1
            assert n_sequences & (n_sequences - 1) == 0
            assert batch.cu_seqlens[-1] == 2 * CTX_LEN == batch.tokens.shape[1]


def test_what_was_drawn_is_counted_by_dataset(conversations):
    config = settings(names=("one", "two"))
    samples = InstructSamples([conversations[:30], conversations[30:]], ["a", "b"], config)
    assert [one.tokens for one in samples.drawn(0)] == [0, 0]
    n_read = Counter()
    batches = ConversationBatches(samples, config, 0, BEGIN, N_STEPS)
    for step in range(N_STEPS):
        filled = sequences(batches[step])
        n_read["all"] += sum(len(tokens) for tokens, _ in filled if set(tokens) - {0})
        drawn = samples.drawn((step + 1) * LANES)
        assert [one.name for one in drawn] == ["one", "two"]
        assert sum(one.tokens for one in drawn) == n_read["all"]
    sizes = [sum(one.n_inputs for one in part) for part in samples.datasets]
    assert [one.epochs for one in drawn] == [
        pytest.approx(one.tokens / size) for one, size in zip(drawn, sizes, strict=True)
    ]
    assert samples_of(conversations, settings()).drawn(LANES) == ()  # one dataset needs no count


def test_the_hash_tells_tokens_and_masks_apart(conversations):
    one = conversations[0]
    other_mask = one._replace(is_learned=~one.is_learned)
    other_token = one._replace(tokens=one.tokens + (np.arange(len(one.tokens)) == 2).astype(np.uint16))
    hashes = {hash_of(found) for found in ([one], [other_mask], [other_token], [one, one], [])}
    assert len(hashes) == 5
    assert hash_of([one]) == hash_of([conversation(0)])


def pair(number):
    """A pair that fits a row, of a prompt of one token."""
    sides = [conversation(seed, longest=6) for seed in (2 * number, 2 * number + 1)]
    return PreferencePair(f"line {number}", *sides)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (1, 2), (2, 2), (4, 1)])
def test_pairs_come_with_their_own_reference(world_size, micro_batch_size):
    pairs = [pair(number) for number in range(30)]
    assert max(one.n_inputs for one in pairs) <= CTX_LEN
    # A value that says which pair it is of.
    reference = (torch.arange(30.0), torch.arange(30.0) + 0.5)
    config = settings(world_size, micro_batch_size)
    samples = InstructSamples([pairs], ["a"], config)
    known = {
        (side, tuple(getattr(one, side).tokens[:-1].tolist())): number
        for number, one in enumerate(pairs)
        for side in ("chosen", "rejected")
    }
    n_found = Counter()
    for rank in range(world_size):
        batches = PairBatches(samples, [reference], config, rank, BEGIN, 2)
        for index in range(len(batches)):
            batch = batches[index]
            cut = sequences(batch)
            for chosen, rejected, ours, theirs in zip(
                batch.pairs.chosen, batch.pairs.rejected, *batch.pairs.reference, strict=True
            ):
                number = known["chosen", tuple(cut[chosen][0])]
                assert known["rejected", tuple(cut[rejected][0])] == number
                assert (float(ours), float(theirs)) == (number, number + 0.5)
                n_found[index // config.trainer.accumulation] += 1
            assert batch.step_targets == sum(
                len(dealt.row.parts)
                for dealt in samples.dealer.step(index // config.trainer.accumulation).rows
            )
    assert n_found[0] == batches[0].step_targets


def test_lanes_of_ranks_are_disjoint_and_all():
    generator = random.Random(1)
    conversations = [conversation(generator.randint(0, 99)) for _ in range(10)]
    read = [
        batch.first_sample + place
        for rank in batches_of(conversations, 4, 1)[0]
        for batch in rank
        for place in range(batch.tokens.shape[1] // CTX_LEN)
    ]
    assert sorted(read) == list(range(LANES))
