"""Checks of single settings: intervals as they are written, and values that only look like numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstm import GenerationConfig, LSTMConfig, TrainingConfig
from tlstm.validation import check_number

INSIDE = {
    "[0, 1)": lambda x: 0 <= x < 1,
    "(0, 1]": lambda x: 0 < x <= 1,
    "[0, 1]": lambda x: 0 <= x <= 1,
    "(0, 1)": lambda x: 0 < x < 1,
    "(0, inf)": lambda x: x > 0,
    "(-inf, inf)": lambda x: True,
}


@given(st.sampled_from(list(INSIDE)), st.one_of(st.sampled_from([0, 0.0, 1, 1.0, 0.5, -3, 7]), st.floats(-2, 2)))
def test_an_interval_means_what_it_says(interval, value):
    if INSIDE[interval](value):
        check_number("x", value, interval)
    else:
        with pytest.raises(ValueError, match="x: expected"):
            check_number("x", value, interval)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), True, "1", None, [1]])
@pytest.mark.parametrize("interval", INSIDE)
def test_what_is_no_finite_number_is_refused(interval, value):
    with pytest.raises(ValueError, match="x: expected"):
        check_number("x", value, interval)


def test_an_absurdly_long_number_is_a_setting_out_of_range():
    huge = 10**400  # more than a float can hold
    with pytest.raises(ValueError, match="top_p"):
        GenerationConfig(do_sample=True, top_p=huge)
    with pytest.raises(ValueError, match="ema_decay"):
        TrainingConfig(ema_decay=huge)
    with pytest.raises(ValueError, match="weight_dropout"):
        LSTMConfig(vocab_size=7, weight_dropout=huge)
