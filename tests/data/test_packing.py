import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.packing import Packed, pack
from lm.data.store import Store


@given(lengths=st.lists(st.integers(1, 50), max_size=80))
@settings(max_examples=60, deadline=None)
def test_every_item_is_in_one_row_that_holds_it(lengths):
    lengths = np.array(lengths, np.int64)
    rows = pack(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = sorted(int(lengths[row].sum()) for row in rows)
    assert all(0 < n <= 50 for n in sums)
    assert len(sums) < 2 or sums[0] + sums[1] > 50  # no two rows would have gone into one


def test_as_good_as_can_be_where_that_is_known():
    lengths = np.array([7, 3, 6, 4, 5, 5, 8, 2] * 30)
    assert len(pack(lengths, 10)) == 120  # every row is full


def of(conversations, row):
    """Packed rows of (tokens, is_answer) pairs."""
    bits = [np.packbits(answers) for _, answers in conversations]
    lengths = np.array([len(tokens) for tokens, _ in conversations], np.uint32)
    tokens = np.concatenate([tokens for tokens, _ in conversations]).astype(np.uint16)
    store = Store(None, {"train": tokens}, {}, {"train": np.concatenate(bits)}, {"train": lengths})
    return Packed(store, "train", row)


def test_cut_to_a_row_and_left_out_without_an_answer():
    long = np.arange(100, 112), np.arange(12) >= 4
    late = np.arange(200, 212), np.arange(12) >= 10  # answers beyond the row
    short = np.arange(3), np.array([False, True, True])
    packed = of([long, late, short, short], 9)
    assert (packed.cut, packed.left_out, packed.filled) == (1, 1, 9 + 3 + 3)
    planes = packed[np.arange(len(packed))]
    assert planes.dtype == np.int32 and planes.shape == (2, 3, 9)
    np.testing.assert_array_equal(planes[0], [np.arange(100, 109), np.arange(9) >= 4, [0] * 9])
    np.testing.assert_array_equal(
        planes[1],
        [
            [0, 1, 2, 0, 1, 2, 0, 0, 0],
            [0, 1, 1, 0, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 1, 1, 2, 2, 2],
        ],
    )


def test_an_answer_that_only_the_first_token_holds_is_none():
    """Nothing comes before it, so nothing predicts it."""
    packed = of([(np.arange(12), np.arange(12) == 0), (np.arange(2), np.array([False, True]))], 5)
    assert (packed.left_out, len(packed)) == (1, 1)
