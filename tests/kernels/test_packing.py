"""Packed copies of weights: refilled in place, gone with their weights."""

import gc
import threading
import weakref

import pytest
import torch

from fastsd.kernels.packing import PackedWeights


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
