"""Teaching a text encoder to read: linear heads on its last state predict what the caption states.

A small encoder trained by the diffusion loss alone may confuse words that change few pixels ("left" and "right"). The heads are
thrown away in the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.models.clip import CLIPText
from fastsd.tokenizer import Tokenizer
from fastsd.training.data import Batch, Caption, Dataset, Draws
from fastsd.training.loop import Task

Slots = Mapping[str, Sequence[str]]
"""What a caption may state, and the values."""


class ClaimHeads(nn.Module):
    """One linear layer for all slots; each has one value more: "not stated"."""

    def __init__(self, slots: Slots, width: int) -> None:
        super().__init__()
        self.sizes = [len(values) + 1 for values in slots.values()]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, state: Tensor, claims: Tensor) -> dict[str, Tensor]:
        """state [B, C] of the first end token, claims [B, slots] → "claims", cross entropy, "read", the share of right ones."""
        scores = self.linear(state.float()).split(self.sizes, dim=-1)
        losses = [F.cross_entropy(score, claims[:, i]) for i, score in enumerate(scores)]
        right = [(score.argmax(-1) == claims[:, i]).float().mean() for i, score in enumerate(scores)]
        return {"claims": torch.stack(losses).mean(), "read": torch.stack(right).mean()}


@dataclass(frozen=True)
class Captions:
    """The captions of a data set. A `Source` of "ids" [L], "end", the place of the first end token, and "claims" [slots]."""

    dataset: Dataset
    tokenizer: Tokenizer
    slots: Slots
    dropout: float = 0.0  # how many are replaced by the empty prompt
    brief: float = 0.0  # how many are the data set's shortest (`brief_caption`)

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, index: int, rng: np.random.Generator) -> Mapping[str, Any]:
        dropped = rng.random() < self.dropout
        brief = self.brief > 0 and rng.random() < self.brief
        caption: Caption = getattr(self.dataset, "brief_caption" if brief else "caption")(index, rng)
        ids = self.tokenizer.encode(["" if dropped else caption.text]).ids[0]
        stated = {} if dropped else caption.stated
        claims = [values.index(stated[slot]) if slot in stated else len(values) for slot, values in self.slots.items()]
        return {
            "ids": torch.tensor(ids),
            "end": torch.tensor(ids.index(self.tokenizer.end_id)),
            "claims": torch.tensor(claims, dtype=torch.long),
        }


class ClaimsTask(Task):
    def __init__(self, text_encoder: CLIPText, slots: Slots) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = ClaimHeads(slots, text_encoder.config.hidden_size)

    def losses(self, batch: Batch, draws: Draws, progress: float) -> dict[str, Tensor]:
        context = self.text_encoder(batch["ids"])
        terms = self.heads(end_state(context, batch["end"]), batch["claims"])
        return {"loss": terms["claims"], "read": terms["read"]}


def end_state(context: Tensor, end: Tensor) -> Tensor:
    """context [B, L, C] at places [B] → [B, C]."""
    return context[torch.arange(len(context), device=context.device), end]
