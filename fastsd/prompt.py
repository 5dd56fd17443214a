"""Prompts → context: what the UNet's cross-attention reads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsd.errors import PromptError
from fastsd.prompt_chunks import STYLES, Chunk
from fastsd.request import Request
from fastsd.tokenizer import Tokenizer

Encode = Callable[[Sequence[tuple[int, ...]]], Sequence[Tensor]]
"""Token ids of chunks, 77 each → their contexts [77, C] on the device."""


def encode_request(
    request: Request,
    tokenizer: Tokenizer,
    encode: Encode,
    device: torch.device,
    dtype: torch.dtype,
    notes: list[str],
) -> tuple[Tensor, Tensor]:
    """→ context [U, L, C], each different prompt once, and for each row of the UNet's batch its row in it.

    The UNet's batch is the B images, or with guidance 2B: their negative prompts, then their prompts. Warnings go to notes.
    """
    sides = [(request.negative_prompts, request.negative_prompt_embeds)] if request.guided else []
    sides.append((request.prompts, request.prompt_embeds))
    texts = [text for prompts, _ in sides for text in prompts or ()]
    parts: list[Tensor] = []
    row_of: dict[str, int] = {}
    if texts:
        longest = max((embeds.shape[1] for _, embeds in sides if embeds is not None), default=0)
        context, row_of = encode_prompts(tokenizer, encode, texts, request.prompt_style, notes, longest)
        parts.append(context)
    rows: list[list[int]] = []
    for prompts, embeds in sides:
        if prompts is not None:
            rows.append([row_of[prompt] for prompt in prompts])
        elif embeds is not None:
            start = sum(map(len, parts))
            rows.append(list(range(start, start + len(embeds))))
            parts.append(embeds.to(device, dtype))
    if len(lengths := {part.shape[1] for part in parts}) > 1:
        raise PromptError(
            f"prompt_embeds: the prompt and the negative prompt differ in tokens ({', '.join(map(str, lengths))}); "
            "give both as embeddings of one length"
        )
    batch = torch.tensor(rows, device=device).repeat_interleave(request.images_per_prompt, 1)
    return torch.cat(parts), batch.flatten()


def encode_prompts(
    tokenizer: Tokenizer, encode: Encode, prompts: Sequence[str], style: str, notes: list[str], longest: int = 0
) -> tuple[Tensor, dict[str, int]]:
    """Prompts → (context [U, L, C], each text's row in it). A text is encoded once however often it stands in P.

    L = 77 a chunk. Prompts of fewer chunks than the longest get empty ones; in style "a1111" also where embeddings `longest`
    tokens long stand beside them. A warning goes to notes for each prompt that was cut.
    """
    texts = list(dict.fromkeys(prompts))
    rows: list[list[Chunk]] = []
    for text in texts:
        chunks, warning = STYLES[style](tokenizer, text)
        rows.append(chunks)
        notes += [warning] if warning else []
    count = max(map(len, rows))
    if style == "a1111":
        count = max(count, longest // tokenizer.max_length)
    empty = Chunk(tuple(tokenizer.framed([])))
    rows = [row + [empty] * (count - len(row)) for row in rows]
    ids = list(dict.fromkeys(chunk.ids for row in rows for chunk in row))
    contexts = dict(zip(ids, encode(ids), strict=True))
    joined = [torch.cat([weighted(contexts[chunk.ids], chunk.weights) for chunk in row]) for row in rows]
    return torch.stack(joined), {text: row for row, text in enumerate(texts)}


def weighted(context: Tensor, weights: Sequence[float] | None) -> Tensor:
    """A chunk's context [L, C] times its tokens' weights, then scaled to the mean it had: the web UI's "Original" emphasis.

    In fp64: weights may bring the mean next to 0, and rounding would then decide the scale. At 0 it is left there.
    """
    if weights is None:
        return context
    before = context.double()
    after = before * torch.tensor(weights, dtype=torch.float64, device=context.device)[:, None]
    scale = before.mean() / after.mean()
    return (after * torch.where(scale.isfinite(), scale, 1.0)).to(context.dtype)
