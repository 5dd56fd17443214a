"""Packed copies of weights: refilled in place, gone with their weights."""

import gc
import threading
import weakref

import pytest
import torch

from fastsd.kernels.packing import PackedWeights, refresh_all


def test_packed_once_and_refilled_in_place() -> None:
    calls = []
    weights = PackedWeights(lambda w: calls.append(1) or w * 2)
    w = torch.ones(3)
    first = weights.get(w)
    assert weights.get(w) is first
    assert len(calls) == 1
    w.add_(1)
    assert weights.get(w) is first, "a captured graph would go on reading the old memory"
    assert first.tolist() == [4, 4, 4]


def test_a_group_is_packed_anew_when_any_of_it_changes() -> None:
    weights = PackedWeights(lambda *group: torch.cat(group))
    a, b = torch.zeros(2), torch.ones(2)
    assert weights.get(a, b).tolist() == [0, 0, 1, 1]
    b.add_(1)
    assert weights.get(a, b).tolist() == [0, 0, 2, 2]
    assert weights.get(a).tolist() == [0, 0], "another group has another size"


def test_nothing_outlives_its_weight() -> None:
    weights = PackedWeights(lambda w: w * 2)
    w = torch.ones(3)
    packed = weakref.ref(weights.get(w))
    del w
    gc.collect()
    assert packed() is None, "the packed copy leaks"


def test_a_weight_whose_changes_are_not_counted_is_refused() -> None:
    with torch.inference_mode():
        w = torch.ones(3)
    with pytest.raises(ValueError, match="inference mode"):
        PackedWeights(lambda w: w).get(w)


def test_threads_get_one_copy() -> None:
    calls = []
    weights = PackedWeights(lambda w: calls.append(1) or w * 2)
    w = torch.ones(3)
    threads = [threading.Thread(target=weights.get, args=(w,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_weight_that_lies_as_it_is_wanted_is_packed_once() -> None:
    calls = []
    weights = PackedWeights(lambda w: calls.append(1) or w.contiguous())
    w = torch.ones(3)
    for _ in range(3):
        assert weights.get(w).data_ptr() == w.data_ptr()
    w.add_(1)
    for _ in range(3):
        assert weights.get(w).tolist() == [2, 2, 2]
    assert len(calls) == 2


def test_refresh_refills_what_nobody_asks_for() -> None:
    """A captured graph reads the buffer and asks nothing."""
    weights, groups = PackedWeights(lambda w: w * 2), PackedWeights(lambda *group: torch.cat(group))
    a, b = torch.ones(2), torch.ones(2)
    packed, grouped = weights.get(a), groups.get(a, b)
    b.zero_()
    a.add_(1)
    refresh_all()
    assert packed.tolist() == [4, 4]
    assert grouped.tolist() == [2, 2, 0, 0]
    del b
    gc.collect()
    refresh_all()  # half a group is left alone


def test_what_was_packed_in_inference_mode_is_refilled_outside_of_it() -> None:
    weights, w = PackedWeights(lambda w: w * 2), torch.ones(3)
    with torch.inference_mode():
        buffer = weights.get(w)
    w.add_(1)
    assert weights.get(w) is buffer
    assert buffer.tolist() == [4, 4, 4]
