"""The weights that a net starts from when it is trained from nothing."""

import torch
from torch import nn

from fastsd.models.clip import CLIPText
from fastsd.models.layers import ResBlock
from fastsd.models.unet import Transformer, UNet


@torch.no_grad()
def initialise_unet(unet: UNet) -> None:
    """PyTorch's, but every residual branch and the output start at zero, as latent diffusion's do (Rombach et al. 2022)."""
    last: list[nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResBlock):
            last.append(module.conv2)
        if isinstance(module, Transformer):
            last.append(module.proj_out)
    for module in last:
        for parameter in module.parameters():
            parameter.zero_()


@torch.no_grad()
def initialise_text_encoder(clip: CLIPText) -> None:
    """Gaussian, scaled by width and depth (Radford et al. 2021, arXiv 2103.00020, section 2.5, after GPT-2)."""
    width, layers = clip.config.hidden_size, clip.config.num_hidden_layers
    residual = width**-0.5 * (2 * layers) ** -0.5
    nn.init.normal_(clip.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(clip.embeddings.position_embedding.weight, std=0.01)
    for layer in clip.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear, std in (
            (attention.q_proj, width**-0.5),
            (attention.k_proj, width**-0.5),
            (attention.v_proj, width**-0.5),
            (attention.out_proj, residual),
            (mlp.fc1, (2 * width) ** -0.5),
            (mlp.fc2, residual),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
