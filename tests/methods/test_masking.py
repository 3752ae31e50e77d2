"""Masks against answers written by hand, against attention run with them, and against bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.methods.masking import causal_mask, combine_masks, padding_mask

T, F = True, False


def test_padding_mask_by_hand():
    mask = padding_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 1, 3)
    assert mask[:, 0, 0].tolist() == [[T, T, F], [T, F, F]]
    assert padding_mask(torch.tensor([[True, False]]))[0, 0, 0].tolist() == [T, F]


def test_padding_mask_refuses_what_it_would_misread():
    with pytest.raises(TypeError, match=r"attention_mask is torch.float32; whole numbers or bool"):
        padding_mask(torch.tensor([[0.0, -1e9]]))  # additive: 0 means "may attend"
    with pytest.raises(ValueError, match=r"attention_mask\[1, 0\] is 2; only 0 and 1 are masks"):
        padding_mask(torch.tensor([[1, 1], [2, 0]]))
    with pytest.raises(ValueError, match=r"shape \(3,\); .*\(batch, keys\)"):
        padding_mask(torch.ones(3, dtype=torch.long))


def test_causal_mask_by_hand():
    assert causal_mask(3).tolist() == [[T, F, F], [T, T, F], [T, T, T]]
    assert causal_mask(0).shape == (0, 0)
    with pytest.raises(RuntimeError, match="negative dimension -1"):  # torch's own
        causal_mask(-1)


def test_combine_masks_by_hand():
    padding = padding_mask(torch.tensor([[1, 1, 0]]))
    both = combine_masks(padding, None, causal_mask(3))
    assert both.shape == (1, 1, 3, 3)
    assert both[0, 0].tolist() == [[T, F, F], [T, T, F], [T, T, F]]
    assert combine_masks() is None and combine_masks(None, None) is None
    assert combine_masks(padding) is padding
    with pytest.raises(TypeError, match=r"mask 1 is torch\.int64.*padding_mask"):
        combine_masks(padding, torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"mask 1 has shape \(4, 4\), which does not broadcast with .*\(1, 1, 1, 3\)"
    ):
        combine_masks(padding, causal_mask(4))


@settings(max_examples=60, deadline=None)
@given(
    function=st.sampled_from([padding_mask, combine_masks]),
    shape=st.lists(st.integers(0, 3), max_size=4),
    dtype=st.sampled_from(
        [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.complex64]
    ),
    value=st.integers(-2, 3),
)
def test_bad_input_gives_value_or_type_errors_only(function, shape, dtype, value):
    tensor = torch.full(shape, abs(value) if dtype == torch.uint8 else value, dtype=dtype)
    try:
        mask = function(tensor)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 30  # says what to do, not just "bad"
    else:
        assert mask.dtype == torch.bool


def test_values_are_not_read_off_the_cpu():
    """On the meta device, which has no values, any read raises: so on a GPU these functions never wait."""
    ids = torch.empty(2, 3, dtype=torch.long, device="meta")
    assert combine_masks(padding_mask(ids), causal_mask(3, device="meta")).shape == (2, 1, 3, 3)
