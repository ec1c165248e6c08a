"""How layers share the page pool's arrays, and how many pages that takes."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.runner.cache_layout import CacheLayout

windows = st.lists(st.sampled_from([None, 3, 4, 17]), min_size=1, max_size=20)
SIZES = {"page_size": 4, "max_step_tokens": 8}


@given(windows, st.integers(1, 200))
def test_layers_of_a_group_look_equally_far_back_and_have_an_array_each(windows, length):
    layout = CacheLayout.of(windows, **SIZES, max_model_len=length)
    assert len(layout.places) == len(windows)
    assert len(set(layout.places)) == len(windows)
    for window, place in zip(windows, layout.places, strict=True):
        assert layout.windows[place.group] == (None if window is None or window >= length else window)
        assert 0 <= place.array < layout.num_arrays


@given(windows, st.integers(1, 200), st.integers(1, 8))
def test_a_sequence_never_sees_more_pages_than_are_counted(windows, length, step):
    layout = CacheLayout.of(windows, **SIZES, max_model_len=length)
    for group, window in enumerate(layout.windows):
        seen = [
            range(0 if window is None else max(0, start - window + 1) // 4, (min(length, start + step) - 1) // 4 + 1)
            for start in range(length)
        ]
        assert max(map(len, seen)) <= layout.pages_of_group(group, length)


def test_models_of_one_kind_of_layer_are_one_group_with_an_array_for_each_layer():
    for window in (None, 16):
        layout = CacheLayout.of([window] * 7, **SIZES, max_model_len=1000)
        assert (layout.windows, layout.num_arrays) == ((window,), 7)


def test_windows_as_long_as_the_longest_sequence_are_none():
    layout = CacheLayout.of([None, 64, 64], **SIZES, max_model_len=64)
    assert (layout.windows, layout.num_arrays) == ((None,), 3)


def test_the_layout_of_gemma_3_27b_keeps_a_sixth_of_the_pages_at_its_full_length():
    windows = [None if (layer + 1) % 6 == 0 else 1024 for layer in range(62)]
    sizes = {"page_size": 64, "max_step_tokens": 4096, "max_model_len": 131_072}
    own, plain = CacheLayout.of(windows, **sizes), CacheLayout.of([None] * 62, **sizes)
    share = own.pages_of(131_072) * own.num_arrays / (plain.pages_of(131_072) * plain.num_arrays)
    assert 10 / 62 < share < 0.21


@given(windows, st.integers(1, 200), st.integers(0, 300))
def test_the_longest_sequence_within_some_pages_fits_and_one_page_more_does_not(windows, limit, pages):
    layout = CacheLayout.of(windows, **SIZES, max_model_len=limit)
    found = layout.longest_within(pages, limit)
    assert layout.pages_of(found) <= pages
    assert found + 4 > limit or layout.pages_of(found + 4) > pages
