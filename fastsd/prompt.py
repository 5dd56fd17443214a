"""Prompts → context: what the UNet's cross-attention reads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsd.errors import PromptError
from fastsd.request import Request
from fastsd.tokenizer import Tokenizer
from fastsd.wording import quoted

Encode = Callable[[Tensor], Tensor]
"""Token ids [U, 77] on the CPU → context [U, 77, C] on the device."""


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
        context, row_of, cut = encode_prompts(tokenizer, encode, texts)
        parts.append(context)
        notes += cut
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
    tokenizer: Tokenizer, encode: Encode, prompts: Sequence[str]
) -> tuple[Tensor, dict[str, int], list[str]]:
    """Prompts → (context [U, 77, C], each text's row in it, warnings). A text is encoded once however often it stands in P.

    A prompt past the encoder's 77 tokens (75 words and pieces of words) is cut there, and a warning says what fell off.
    """
    texts = list(dict.fromkeys(prompts))
    tokens = tokenizer.encode(texts)
    limit = tokenizer.max_length
    warnings = [
        f"a prompt ({quoted(text)}) is longer than {limit} tokens, so this was left out: {quoted(dropped)}"
        for text, dropped in zip(texts, tokens.dropped, strict=True)
        if dropped
    ]
    return encode(torch.tensor(tokens.ids)), {text: row for row, text in enumerate(texts)}, warnings
