"""Every tolerance of the suite, with its reason. Loosening one needs a line in CHANGELOG."""

import torch

# Nets on the reference ops against diffusers and transformers: fp32, same weights, same inputs; largest absolute error.
NET = 1e-4
# Pictures against diffusers' StableDiffusionPipeline: fp32, same weights, same latents; lowest PSNR in dB.
IMAGE_PSNR = 60.0
# A second pass against image to image on what the first one drew, enlarged here: fastsd itself on both sides.
SECOND_PASS_PSNR = 80.0

# A 20-step picture of the small model in half precision against fp32; lowest PSNR in dB.
HALF_PSNR = {"float16": 55.0, "bfloat16": 42.0}
# Two half-precision pictures, ours and diffusers', which rounds the latents at every step where fastsd does not; lowest PSNR in
# dB. Measured on random weights, 6 to 50 steps: 56 and 38 dB at least; a picture of one step more: 36 dB at most.
HALF_IMAGE_PSNR = {torch.float16: 45.0, torch.bfloat16: 36.0}
# A picture through the VAE and back; lowest PSNR in dB. 33 dB was measured on the drawings it was trained on.
RECONSTRUCTION_PSNR = 30.0
# The mean squared error of a reconstruction, ours against diffusers' and alone against in a batch, relative. Measured: 4e-7.
RECONSTRUCTION_ERROR = 5e-6
# Rows of the schedule's time projections computed together against each alone: another order of adding up.
HOISTED = 1e-5
# The sinusoid against diffusers': fp32 angles of up to 999 radians, whose last bit is 6e-5.
SINUSOID = 2e-4

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
    "conv2d_norm": {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    "step_input": {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
    "sampler_step": {torch.float32: 1e-6},
}
# One op set against another on a whole net: relative L2, and the cosine of the angle between the outputs.
UNET_STEP = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
COSINE = {torch.float32: 0.999999, torch.float16: 0.9999, torch.bfloat16: 0.9995}

# diffusers' ᾱ, float32, against ours in float64, relative. Measured: 1e-6; 1.4e-5 at the cosine schedule's end, where 1 - 0.999
# is rounded.
ALPHA_BAR = 3e-5
# The largest error over a step, relative to the largest value (at least 1) of that step. diffusers keeps its tables in
# float32, which is off by 1e-6 in ᾱ and, near timestep 0, by 3e-5 in 1 - ᾱ. Measured over all cases: 5e-6 in the latents,
# 1.3e-5 in the initial scale. A slip of one timestep shows as 1e-3 and more.
SAMPLER = 3e-5
# The same where diffusers is made to compute in float64: only the order of the arithmetic differs, and DDPM's last step, where
# diffusers keeps a standard deviation of 1e-10 instead of 0.
SAMPLER_FP64 = 1e-9
# LCM's twin has its boundary condition in float32. Measured: 4.9e-8; its roundoff is 6e-8.
SAMPLER_FP64_LCM = 2e-7
# ᾱ where its root is shifted to 0 at the end, in diffusers' float32, relative. Measured: 3.8e-5, at the last but one.
ZERO_SNR = 1e-4
# Timesteps worked back from σ by way of float32: log σ rises by only 3e-3 a timestep. Measured: 1.3e-3.
TIMESTEP = 3e-3
# Levels made from one another in float32 (DPM2 ancestral's middle one), near timestep 0. Measured: 1.1e-2.
TIMESTEP_OF_MIDDLE = 2e-2
# The same for DEIS, UniPC and DPM2 ancestral, which take differences of nearly equal float32 numbers. Measured: 1.3e-4.
SAMPLER_CANCELLING = 2e-4
# Landing on the one image of the data, in float64. Euler's first step cancels σ = 14.6, single steps divide by sqrt(ᾱ).
LANDING = 1e-9
# Variances after a noisy step: some sums and products of float64 numbers below 1e3.
NOISE_VARIANCE = 1e-12

# Weights with LoRA, LoHa or LoKr merged in, against PEFT and diffusers: fp32, relative L2 a tensor. Measured: 4e-8, some 1e-7 for
# the formulas of LyCORIS. And the latents of two steps that are drawn with them; measured: 1.5e-6.
LORA_WEIGHT = 1e-6
LORA_PICTURE = 1e-5
# Shares of image and noise that a table leads to, in float64, against those an image is noised with, relative where above 1.
NOISE_LEVEL = 1e-6

# A request beside others in one batch against the same alone, values in [0, 1]: the sums are added in another order. Measured:
# 1.2e-5 at most.
MIXED_BATCH = 1e-4

# A CUDA device's normal numbers against ours: it takes the sine to 2⁻²¹ · sqrt(2 · 22) at most. Not yet measured on a GPU.
CUDA_NOISE = 5e-6

# A callback's "denoised" against diffusers' pred_original_sample, relative L2 a step: nets in fp32, divided by the image's share
# at the end of the schedule, 0.07. Measured: 1.7e-5. And against what the UNet said of the same latents, worked back from the
# states: 2.1e-7, and beside other requests in a batch 4.0e-6.
DENOISED_TWIN = 1e-4
DENOISED = 2e-5

# A linear preview, one pixel a latent, against what the VAE decodes, averaged; lowest PSNR in dB on drawings of the small
# model. 20.9 to 22.5 was measured; a map fitted on the drawings themselves has 21.9 to 27.7.
PREVIEW_PSNR = 19.0
# A preview after 5 of 12 steps of Euler a against the picture that comes of it; measured: 19.8 dB, and of the latents 7.6.
PREVIEW_EARLY_PSNR = 16.0
# TAESD's pictures against diffusers', levels of 255: half a level of rounding, and NET.
PREVIEW_TAESD_LEVELS = 0.6
