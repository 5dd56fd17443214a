"""Every tolerance of the suite, with its reason. Loosening one needs a line in CHANGELOG."""

import torch

# Nets on the reference ops against diffusers and transformers: fp32, same weights, same inputs; largest absolute error.
NET = 1e-4
# Pictures against diffusers' StableDiffusionPipeline: fp32, same weights, same latents; lowest PSNR in dB.
IMAGE_PSNR = 60.0

# A picture alone against the same picture in a batch, same seed: levels of 255, and the share of values that may differ at
# all. One value of 12,288 was measured.
BATCH_LEVELS = 1
BATCH_SHARE = 1e-3

# Ops against an fp64 truth on the quantised inputs: relative L2 error (an op may also not err more than twice as much as
# plain PyTorch in the same dtype).
OPS = {
    "linear": {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
    "conv2d": {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
    "geglu": {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3},
    "attention": {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 7e-3},
    "layer_norm": {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3},
    "group_norm": {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    "sampler_step": {torch.float32: 1e-6},
}
# One op set against another on a whole net, relative L2.
UNET_STEP = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
