"""Dropout masks: known answers of the generator, and the properties that every backend relies on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.kernels import Dropout, philox


def words(*counter, key=0, rounds=10):
    return [int(word) for word in philox.philox(*(torch.tensor([c]) for c in counter), key, rounds)]


def test_ten_rounds_give_the_published_known_answers():
    ones = 0xFFFFFFFF
    assert words(0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(ones, ones, ones, ones, key=(ones << 32) | ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(*pi, key=(0x299F31D0 << 32) | 0xA4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**62), st.integers(0, 200), st.floats(0, 0.9))
def test_an_element_depends_on_key_site_row_and_column_alone(rows, columns, key, site, p):
    dropout = Dropout(p, key, site)
    mask = philox.keep_mask((rows, columns), dropout)
    larger = philox.keep_mask((rows + 3, columns + 9), dropout)
    assert torch.equal(mask, larger[:rows, :columns])
    assert torch.equal(mask, philox.keep_mask((1, rows, columns), dropout)[0])


def test_an_element_equals_its_lane_of_the_generator():
    dropout = Dropout(0.4, 0x1234567890ABCDEF >> 1, 5)
    mask = philox.keep_mask((7, 21), dropout)
    for row, column in ((0, 0), (3, 9), (6, 20), (2, 15)):
        word = words(column // 8, row, dropout.site, 0, key=dropout.key, rounds=7)[column % 8 // 2]
        lane = word >> 16 if column % 2 else word & 0xFFFF
        assert mask[row, column].item() == (lane >= round(0.4 * 65536))


def test_the_share_kept_is_one_minus_p_and_sites_differ():
    masks = [philox.keep_mask((512, 512), Dropout(0.1, 42, site)) for site in range(2)]
    for mask in masks:
        assert mask.double().mean().item() == pytest.approx(0.9, abs=0.003)
    both = (masks[0] & masks[1]).double().mean().item()
    assert both == pytest.approx(0.81, abs=0.005)


def test_dropout_keeps_the_expectation_and_none_returns_the_input():
    x = torch.ones(256, 256)
    assert philox.apply(x, Dropout(0.25, 7, 0)).mean().item() == pytest.approx(1.0, abs=0.01)
    assert philox.apply(x, None) is x
    assert philox.apply(x, Dropout(0.0, 7, 0)) is x
    with pytest.raises(ValueError, match="below 1"):
        philox.apply(x, Dropout(1.0, 7, 0))


def test_a_probability_next_to_one_drops_nearly_all_and_never_divides_by_zero():
    nearly = Dropout(1 - 1e-9, 3, 1)
    assert philox.threshold(nearly.p) == 65535
    x = torch.ones(64, 64)
    assert torch.isfinite(philox.apply(x, nearly)).all()
