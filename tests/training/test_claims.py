"""Captions as ids, dropped at their rate, and the heads that read what they state."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsd.training.claims import Captions, ClaimHeads, ClaimsTask, end_state
from fastsd.training.data import Caption, Draws, Share, batches
from fastsd.training.loop import FitOptions, fit
from fastsd.training.model import Model
from fastsd.training.shape_captions import SLOTS
from tests.training.builders import CPU, MAX_LENGTH, differing, drawings, logged, state_of

FEW = {"colour": ("red", "green"), "shape": ("circle", "square", "star")}


class Two:
    """One caption that states all, one that states a shape only, and one too long for the encoder. A `Dataset`."""

    captions = (
        Caption("a green star", {"colour": "green", "shape": "star"}),
        Caption("a square", {"shape": "square"}),
        Caption("a red circle " * MAX_LENGTH, {}),
    )

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, index: int) -> np.ndarray:
        raise AssertionError("not asked for")

    def caption(self, index: int, rng: np.random.Generator) -> Caption:
        return self.captions[index]


def test_an_item_says_what_its_caption_states(model: Model) -> None:
    source = Captions(Two(), model.tokenizer, FEW)
    items = [source.item(index, np.random.default_rng(0)) for index in range(3)]
    assert [item["claims"].tolist() for item in items] == [[1, 2], [2, 1], [2, 3]], "one past the values: not stated"
    assert items[0]["ids"].tolist() == model.tokenizer.encode(["a green star"]).ids[0]
    assert [item["end"].item() for item in items] == [4, 3, MAX_LENGTH - 1]
    assert all(item["ids"][item["end"]] == model.tokenizer.end_id for item in items)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_captions_are_dropped_at_their_rate(dropout: float, model: Model) -> None:
    """Of 2,000, within 4 standard errors; a dropped one is the empty prompt, which states nothing."""
    source = Captions(Two(), model.tokenizer, FEW, dropout)
    items = [source.item(0, np.random.default_rng(seed)) for seed in range(2000)]
    empty = model.tokenizer.encode([""]).ids[0]
    dropped = [item for item in items if item["ids"].tolist() == empty]
    assert abs(len(dropped) / 2000 - dropout) <= 0.041 * (dropout > 0)
    assert all(item["claims"].tolist() == [2, 3] and item["end"] == 1 for item in dropped)
    kept = [item for item in items if item["claims"].tolist() == [1, 2]]
    assert len(kept) + len(dropped) == 2000


class Brief(Two):
    def brief_caption(self, index: int, rng: np.random.Generator) -> Caption:
        return Caption("green", {"colour": "green"})


@pytest.mark.parametrize("brief", [0.0, 0.3, 1.0])
def test_captions_are_brief_at_their_rate(brief: float, model: Model) -> None:
    """Of 2,000, within 4 standard errors; what is left out is not stated."""
    source = Captions(Brief(), model.tokenizer, FEW, brief=brief)
    items = [source.item(0, np.random.default_rng(seed)) for seed in range(2000)]
    ids = [item["ids"].tolist() for item in items]
    least, full = (model.tokenizer.encode([text]).ids[0] for text in ("green", "a green star"))
    assert abs(ids.count(least) / 2000 - brief) <= 0.041 * (0 < brief < 1)
    assert ids.count(least) + ids.count(full) == 2000
    assert all(item["claims"].tolist() == ([1, 3] if item["ids"].tolist() == least else [1, 2]) for item in items)


def test_which_caption_is_shown_does_not_depend_on_the_rate(model: Model) -> None:
    """The choice of the sentence comes after that of dropping it, from the same numbers."""
    rare, often = (Captions(drawings(), model.tokenizer, SLOTS, dropout) for dropout in (0.01, 0.5))
    empty = model.tokenizer.encode([""]).ids[0]
    pairs = [[s.item(1, np.random.default_rng(seed))["ids"].tolist() for s in (rare, often)] for seed in range(40)]
    shown = [pair for pair in pairs if empty not in pair]
    assert 5 < len(shown) < 40
    assert all(a == b for a, b in shown)


def test_the_loss_is_the_mean_cross_entropy_of_the_slots() -> None:
    torch.manual_seed(0)
    heads = ClaimHeads(FEW, 5)
    state, claims = torch.randn(4, 5), torch.tensor([[0, 3], [1, 0], [2, 1], [0, 2]])
    found = heads(state, claims)
    scores = state @ heads.linear.weight.T + heads.linear.bias
    assert scores.shape == (4, 7), "2 + 1 colours and 3 + 1 shapes"
    chances = [F.softmax(scores[:, :3], -1), F.softmax(scores[:, 3:], -1)]
    terms = [-chance[torch.arange(4), claims[:, i]].log().mean() for i, chance in enumerate(chances)]
    right = [(chance.argmax(-1) == claims[:, i]).float().mean() for i, chance in enumerate(chances)]
    torch.testing.assert_close(found["claims"], sum(terms) / 2)
    torch.testing.assert_close(found["read"], sum(right) / 2)


def test_heads_that_are_sure_and_right_lose_nothing() -> None:
    heads = ClaimHeads(FEW, 7)
    with torch.no_grad():
        heads.linear.weight.copy_(50 * torch.eye(7))
        heads.linear.bias.zero_()
    claims = torch.tensor([[0, 3], [2, 1]])
    found = heads(F.one_hot(claims[:, 0], 7) + F.one_hot(3 + claims[:, 1], 7), claims)
    assert found["claims"].item() == pytest.approx(0, abs=1e-6)
    assert found["read"].item() == 1


def test_the_state_is_that_of_each_caption_s_end() -> None:
    context = torch.arange(24.0).reshape(2, 4, 3)
    assert end_state(context, torch.tensor([1, 3])).tolist() == [[3, 4, 5], [21, 22, 23]]


def test_the_task_reads_at_the_first_end_token(model: Model) -> None:
    """CLIP's padding is the end token too; what comes after the first cannot matter, as the encoder looks back only."""
    torch.manual_seed(0)
    task = ClaimsTask(model.text_encoder, SLOTS)
    draws = Draws(0, 0, Share(4, 0, 4), CPU)
    batch = dict(next(batches(Captions(drawings(), model.tokenizer, SLOTS), Share(4, 0, 4), 0, 0, 1)))
    found = task.losses(batch, draws, 0.0)
    ids = batch["ids"].clone()
    for row, end in zip(ids, batch["end"].tolist(), strict=True):
        row[end + 1 :] = 0
    assert not torch.equal(ids, batch["ids"])
    assert task.losses(batch | {"ids": ids}, draws, 0.0)["loss"].item() == pytest.approx(found["loss"].item(), rel=1e-6)
    ids[:, 1] = 0
    assert task.losses(batch | {"ids": ids}, draws, 0.0)["loss"].item() != pytest.approx(found["loss"].item(), rel=1e-3)


def test_the_text_encoder_learns_to_read(model: Model, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = state_of(model.text_encoder)
    task = ClaimsTask(model.text_encoder, FEW)
    options = FitOptions(steps=40, batch_size=4, learning_rate=1e-2, warmup_steps=0, ema_decay=0, log_every=1)
    fit(task, Captions(Two(), model.tokenizer, FEW), options, tmp_path)
    lines = logged(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[0]["read"] < lines[-1]["read"] == 1
    assert "/encoder.layers.0.self_attn.v_proj.weight" in differing(state_of(model.text_encoder), before)
