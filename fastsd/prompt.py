"""Prompts → context: what the UNet's cross-attention reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd.models.clip import CLIPText
from fastsd.tokenizer import Tokenizer
from fastsd.wording import quoted


def encode_prompts(
    tokenizer: Tokenizer, text_encoder: CLIPText, prompts: Sequence[str], clip_skip: int = 0
) -> tuple[Tensor, dict[str, int], list[str]]:
    """Prompts → (context [U, 77, C], each text's row in it, warnings). A text is encoded once however often it stands in P.

    A prompt past the encoder's 77 tokens (75 words and pieces of words) is cut there, and a warning says what fell off.
    """
    texts = list(dict.fromkeys(prompts))
    tokens = tokenizer.encode(texts)
    ids = torch.tensor(tokens.ids, device=text_encoder.final_layer_norm.weight.device)  # [U, 77]
    limit = tokenizer.max_length
    warnings = [
        f"a prompt ({quoted(text)}) is longer than {limit} tokens, so this was left out: {quoted(dropped)}"
        for text, dropped in zip(texts, tokens.dropped, strict=True)
        if dropped
    ]
    return text_encoder(ids, clip_skip), {text: row for row, text in enumerate(texts)}, warnings
