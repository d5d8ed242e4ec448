"""Which documents train, are held out, or repeat an earlier one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.console import InputError
from common.corpus.splits import (
    SeenHashes,
    hashes_of_equals,
    repeated,
    split_by_hash,
    split_in_order,
    splits_alone,
)

hash_lists = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=60)


def is_partition(split) -> bool:
    return bool((np.stack([split.train, split.held_out, split.test, split.duplicate]).sum(axis=0) == 1).all())


@given(hash_lists, st.floats(0.001, 0.999), st.booleans())
def test_copies_of_a_document_are_on_the_same_side(hashes, fraction, keep_duplicates):
    hashes = np.array(hashes, dtype=np.uint64)
    if len(hashes) == 0:
        with pytest.raises(InputError, match="no documents; give more"):
            split_by_hash(hashes, fraction)
        return
    split = split_by_hash(hashes, fraction, keep_duplicates)
    assert is_partition(split)
    if len(np.unique(hashes)) == 1:  # its tail is held out later
        assert split.train[0] and not split.held_out.any()
        return
    assert split.train.any() and split.held_out.any() and not split.test.any()
    assert not set(hashes[split.held_out].tolist()) & set(hashes[split.train].tolist())
    assert split.duplicate.sum() == (0 if keep_duplicates else len(hashes) - len(set(hashes.tolist())))


def test_a_split_that_the_limit_alone_decides_is_the_same_with_any_other_documents():
    """Half of all hashes are held out. Without one on each side, the lowest or the highest of all decides."""
    low, high = 1, 2**64 - 2
    for own, alone in (([low, high], True), ([low, low + 1], False), ([high, high - 1], False), ([high], False)):
        assert splits_alone(np.array(own, np.uint64), 0.5) == alone
        others = ([], [0], [2**64 - 1], [0, 2**64 - 1])
        splits = [split_by_hash(np.array([*own, *other], np.uint64), 0.5).held_out[: len(own)] for other in others]
        assert all((split == splits[0]).all() for split in splits) == alone


def test_the_held_out_share_and_its_stability():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    split = split_by_hash(hashes, 0.05)
    assert abs(split.held_out.mean() - 0.05) < 0.003  # four standard deviations
    appended = split_by_hash(hashes[:50_000], 0.05)
    assert (appended.held_out == split.held_out[:50_000]).all()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_an_impossible_held_out_fraction_is_refused(fraction):
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        split_by_hash(np.array([1, 2], np.uint64), fraction)


@given(hash_lists)
def test_the_first_of_equal_documents_stays(hashes):
    seen, expected = set(), []
    for number in hashes:
        expected.append(number in seen)
        seen.add(number)
    assert repeated(np.array(hashes, np.uint64)).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 5) | st.integers(2**64 - 3, 2**64 - 1))))
def test_documents_with_the_same_ids_get_the_lowest_hash_among_them(documents):
    lowest = {}
    for chosen_by, ids in documents:
        lowest[ids] = min(chosen_by, lowest.get(ids, chosen_by))
    hashes, id_hashes = (np.array([pair[place] for pair in documents], np.uint64) for place in (0, 1))
    assert hashes_of_equals(hashes, id_hashes).tolist() == [lowest[ids] for _, ids in documents]


@given(st.lists(hash_lists, max_size=12))
def test_seen_hashes_are_a_set(batches):
    seen, truth = SeenHashes(), set()
    for batch in batches:
        new = []
        for number in batch:
            new.append(number not in truth)
            truth.add(number)
        assert seen.add(np.array(batch, np.uint64)).tolist() == new
    assert sum(map(len, seen.arrays)) == len(truth)


@pytest.mark.parametrize(
    ("shares", "counts"),
    [("949,50,1", [949, 50, 1]), ("9,1", [900, 100, 0]), ("0.5,0.25,0.25", [500, 250, 250]), ("1,1,0", [500, 500, 0])],
)
def test_a_split_in_order(shares, counts):
    split = split_in_order([1000], np.arange(1000, dtype=np.uint64), shares)
    assert is_partition(split)
    assert [int(split.train.sum()), int(split.held_out.sum()), int(split.test.sum())] == counts
    order = np.concatenate([np.flatnonzero(mask) for mask in (split.train, split.held_out, split.test)])
    assert order.tolist() == list(range(1000))


def test_rounding_is_megatrons():
    # megatron's get_train_valid_test_split_ on "949,50,1" and 777 documents, by hand: 737.4 + 38.9 + 0.8 ->
    # 737, 776, 777 (each share rounded, then the excess of 0 taken off).
    split = split_in_order([777], np.arange(777, dtype=np.uint64), "949,50,1")
    assert [int(split.train.sum()), int(split.held_out.sum()), int(split.test.sum())] == [737, 39, 1]
    # 10 documents in three equal shares: 3.33 each rounds to 3, 3, 3: one is missing, and moves every end.
    split = split_in_order([10], np.arange(10, dtype=np.uint64), "1,1,1")
    assert [int(split.train.sum()), int(split.held_out.sum()), int(split.test.sum())] == [4, 3, 3]


def test_each_source_is_split_in_order_and_duplicates_leave_their_share():
    hashes = np.array([1, 2, 3, 4, 1, 5, 6, 7], np.uint64)
    split = split_in_order([4, 4], hashes, "1,1")
    assert split.train.tolist() == [True, True, False, False, False, True, False, False]
    assert split.duplicate.tolist() == [False] * 4 + [True] + [False] * 3
    assert not split_in_order([4, 4], hashes, "1,1", keep_duplicates=True).duplicate.any()


@pytest.mark.parametrize("shares", ["", "1", "a,b", "0,1", "1,0", "1,2,3,4", "1,-1", "nan,1"])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(InputError, match="such as 949,50,1"):
        split_in_order([4], np.arange(4, dtype=np.uint64), shares)
