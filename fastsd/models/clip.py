"""CLIP's text encoder: prompt tokens → context. SD 1.x: ViT-L/14 with QuickGELU; SD 2.x: OpenCLIP-H with GELU.

Radford et al. 2021, arXiv 2103.00020; the attribute names are transformers' CLIPTextModel's, without `text_model.`.
"""

import torch
from torch import Tensor, nn

from fastsd.config import CLIPConfig
from fastsd.models.layers import LayerNorm, Linear, module_list, project_heads
from fastsd.ops import REFERENCE, Ops


class CLIPText(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, ops)
        self.final_layer_norm = LayerNorm(ops, config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor, clip_skip: int = 0, mask: Tensor | None = None) -> Tensor:
        """ids [B, L] integers, L ≤ 77 → context [B, L, C], the final norm applied.

        clip_skip = k leaves out the last k layers, as diffusers counts. mask [B, L] boolean (True: a token to attend to)
        is for checkpoints whose config asks for one; Stable Diffusion attends to its padding.
        """
        x = self.embeddings(ids)  # [B, L, C]
        mask = None if mask is None else causal_mask(mask)
        layers = self.encoder.layers
        for layer in layers[: len(layers) - clip_skip]:
            x = layer(x, mask)
        return self.final_layer_norm(x)


class Embeddings(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:  # [B, L] → [B, L, C]
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    """Holds the layers under their checkpoint name."""

    def __init__(self, config: CLIPConfig, ops: Ops) -> None:
        super().__init__()
        self.layers = module_list(EncoderLayer(config, ops) for _ in range(config.num_hidden_layers))


class EncoderLayer(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Ops) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(ops, width, eps)
        self.self_attn = SelfAttention(ops, width, config.num_attention_heads)
        self.layer_norm2 = LayerNorm(ops, width, eps)
        self.mlp = MLP(config, ops)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, L, C]
        x = self.self_attn(self.layer_norm1(x), residual=x, mask=mask)
        return self.mlp(self.layer_norm2(x), residual=x)


class SelfAttention(nn.Module):
    def __init__(self, ops: Ops, width: int, heads: int) -> None:
        super().__init__()
        self.ops = ops
        self.heads = heads
        self.q_proj = Linear(ops, width, width)
        self.k_proj = Linear(ops, width, width)
        self.v_proj = Linear(ops, width, width)
        self.out_proj = Linear(ops, width, width)

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, L, C]
        q, k, v = project_heads(self.ops, x, (self.q_proj, self.k_proj, self.v_proj), self.heads)
        x = self.ops.attention(q, k, v, mask, causal=mask is None, head_dim=x.shape[-1] // self.heads)  # [B, L, N, D]
        return self.out_proj(x.flatten(2), residual)


class MLP(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Ops) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.fc1 = Linear(ops, config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(ops, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # [B, L, C]
        return self.fc2(self.fc1(x, activation=self.activation), residual)


def causal_mask(mask: Tensor) -> Tensor:
    """Which token may attend to which: those before it that mask [B, L] keeps → [B, 1, L, L] boolean."""
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return causal & mask.bool()[:, None, None, :]
