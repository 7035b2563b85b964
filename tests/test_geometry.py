"""Boxes and blocks against sets of voxels counted one by one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emae._geometry import Box, blocks, parse_box

corner = st.integers(-4, 6)
boxes = st.builds(
    lambda s, n: Box(s, [a + k for a, k in zip(s, n)]),
    *[st.tuples(*[r] * 2) for r in (corner, st.integers(0, 5))],
)


def voxels(box):
    return set(itertools.product(*(range(a, b) for a, b in zip(box.start, box.stop))))


@given(boxes, boxes)
def test_intersection_and_containment_are_those_of_the_voxels(a, b):
    assert voxels(a.intersect(b)) == voxels(a) & voxels(b)
    assert a.contains(b) == (voxels(b) <= voxels(a))
    assert a.size == len(voxels(a)) and a.is_empty == (not voxels(a))


def test_shift_grow_slices_and_text():
    box = Box((1, 2, 3), (4, 6, 8))
    assert box.shift((1, -2, 0)) == Box((2, 0, 3), (5, 4, 8))
    assert box.grow((0, 1, 2)) == Box((1, 1, 1), (4, 7, 10))
    assert str(box) == "1:4,2:6,3:8"
    assert np.zeros((9, 9, 9))[box.slices].shape == box.shape == (3, 4, 5)
    with pytest.raises(AssertionError):
        box.grow(2).slices  # noqa: B018  numpy would wrap the negative start around


@pytest.mark.parametrize(
    ("text", "stop"), [("1:4,2:6,3:8", (4, 6, 8)), ("1:,2:6,3:", (10, 6, 30)), (" 1:4, 2:, 3:8", (4, 20, 8))]
)
def test_parse_box(text, stop):
    assert parse_box(text, (10, 20, 30)) == Box((1, 2, 3), stop)
    assert parse_box(str(parse_box(text, (10, 20, 30))), (10, 20, 30)) == Box((1, 2, 3), stop)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("1:2,3:4", "2 ranges"),
        ("a:2,:,:", "cannot read"),
        ("5:5,:,:", "empty"),
        (":,:,0:31", "outside"),
        ("-2:,:,:", "cannot read"),
        ("1,2,3", "cannot read"),
    ],
)
def test_parse_box_refuses(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_box(text, (10, 20, 30))


@given(boxes, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 3))
def test_blocks_tile_the_box_and_their_halos_stay_inside(total, shape, halo):
    count = np.zeros((20, 20), int)
    found = blocks(total, shape, halo)
    for block in found:
        count[block.write.shift((5, 5)).slices] += 1
        assert voxels(block.read) == voxels(block.write.grow(halo)) & voxels(total)
        assert all(side <= wanted for side, wanted in zip(block.write.shape, shape))
    expected = np.zeros_like(count)
    expected[total.shift((5, 5)).slices] = 1
    np.testing.assert_array_equal(count, expected)
    assert [block.index for block in found] == sorted(block.index for block in found)


def test_blocks_refuse_a_shape_of_other_axes():
    with pytest.raises(ValueError, match="block shape"):
        blocks(Box.of_shape((4, 4)), (2, 2, 2), 0)
