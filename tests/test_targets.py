"""Affinities against a loop over voxels, and the loss by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emae._targets import NEAREST, Affinities, affinities

step = st.integers(-4, 4)


def by_loop(labels, valid, offsets):
    affinity, counts = np.zeros((2, len(offsets), *labels.shape), bool)
    for k, v in itertools.product(range(len(offsets)), np.ndindex(labels.shape)):
        w = tuple(a + o for a, o in zip(v, offsets[k]))
        if any(not 0 <= a < s for a, s in zip(w, labels.shape)):
            continue
        affinity[(k, *v)] = labels[v] == labels[w] and labels[v] != 0
        counts[(k, *v)] = valid[v] and valid[w]
    return affinity, counts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.tuples(*[st.integers(1, 5)] * 3), st.lists(st.tuples(step, step, step), min_size=1,
                                                                           max_size=3))
def test_affinities_are_the_loop(seed, shape, offsets):
    rng = np.random.default_rng(seed)
    labels, valid = rng.integers(0, 3, (2, *shape)), rng.random((2, *shape)) < 0.8
    affinity, counts = affinities(torch.from_numpy(labels), torch.from_numpy(valid), tuple(offsets))
    assert affinity.dtype == counts.dtype == torch.bool
    for b in range(2):
        wanted = by_loop(labels[b], valid[b], offsets)
        np.testing.assert_array_equal(affinity[b], wanted[0])
        np.testing.assert_array_equal(counts[b], wanted[1])


def test_conventions_by_hand():
    """Stored at v for its neighbour v + offset; background has none; nearest offsets are negative, as in waterz."""
    labels = torch.tensor([[[[7, 7, 0, 0, 5, 6]]]])
    affinity, counts = affinities(labels, torch.ones_like(labels, dtype=torch.bool), ((0, 0, -1), (0, 0, 2)))
    assert affinity[0, 0, 0, 0].tolist() == [False, True, False, False, False, False]
    assert counts[0, 0, 0, 0].tolist() == [False, True, True, True, True, True]
    assert counts[0, 1, 0, 0].tolist() == [True, True, True, True, False, False]
    assert NEAREST == ((-1, 0, 0), (0, -1, 0), (0, 0, -1))


def test_relabelling_changes_nothing():
    labels = torch.randint(0, 4, (1, 4, 5, 6), generator=torch.Generator().manual_seed(0))
    other = torch.tensor([0, 9, 2**40, 5])[labels]
    valid = torch.ones_like(labels, dtype=torch.bool)
    assert torch.equal(affinities(labels, valid, NEAREST)[0], affinities(other, valid, NEAREST)[0])


def test_loss_counts_only_what_counts():
    config = Affinities(offsets=NEAREST)
    assert config.channels == 3
    logits = torch.tensor([0.0, 2.0, -3.0, 50.0]).view(1, 1, 1, 1, 4).requires_grad_()
    target = torch.tensor([True, True, False, False]).view(1, 1, 1, 1, 4)
    counts = torch.tensor([True, True, True, False]).view(1, 1, 1, 1, 4)
    loss = config.loss(logits, target, counts)
    wanted = (math.log(2) + math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-3))) / 3
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert logits.grad[..., 3] == 0 and (logits.grad[..., :3] != 0).all()
    assert config.loss(logits, target, torch.zeros_like(counts)).item() == 0, "a crop without known labels"
    torch.testing.assert_close(config.probabilities(torch.tensor([0.0, math.log(3)])), torch.tensor([0.5, 0.75]))
