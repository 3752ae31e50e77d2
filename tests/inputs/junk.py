"""Hypothesis strategies for rows of anything, for the tests of every room; needs no `datasets`."""

from hypothesis import strategies as st

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(-100),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "a"]), inner, max_size=2),
    max_leaves=5,
)
ROWS = st.lists(
    JUNK | st.fixed_dictionaries({"input_ids": JUNK}, optional={"labels": JUNK, "token_type_ids": JUNK}), max_size=3
)
