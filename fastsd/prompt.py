"""Prompts → context: what the UNet's cross-attention reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd.models.clip import CLIPText
from fastsd.tokenizer import Tokenizer


def encode_prompts(
    tokenizer: Tokenizer, text_encoder: CLIPText, prompts: Sequence[str], clip_skip: int = 0
) -> tuple[Tensor, list[str]]:
    """Prompts → (context [P, 77, C], warnings). Each different text is encoded once.

    A prompt past the encoder's 77 tokens (75 words and pieces of words) is cut there, and a warning says what fell off.
    """
    texts = list(dict.fromkeys(prompts))
    tokens = tokenizer.encode(texts)
    ids = torch.tensor(tokens.ids, device=text_encoder.final_layer_norm.weight.device)  # [U, 77]
    context = text_encoder(ids, clip_skip)[[texts.index(prompt) for prompt in prompts]]
    limit = tokenizer.max_length
    warnings = [f"prompt: past {limit} tokens, so this was left out: {text!r}" for text in tokens.dropped if text]
    return context, warnings
