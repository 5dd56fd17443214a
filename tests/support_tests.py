"""Which tests measure each feature of docs/SUPPORT.md: a whole test function with all its cases, or chosen cases."""

from fastsd.sampling import SAMPLERS


def cases(test: str, *ids: str) -> tuple[str, ...]:
    return tuple(f"tests/{test}[{one}]" for one in ids)


PICTURES = "test_pipeline_parity.py::"
PARITY = "sampling/test_sampler_parity.py::test_equals_diffusers"
PUBLISHED = "sampling/test_published_algorithms.py::test_equals_the_published_algorithm"
FILES = "checkpoints/test_single_file.py::"
CHUNKS = "test_prompt.py::test_contexts_equal_transformers_on_the_chunks"
LORA = "tests/test_adapters_lora.py::"
KERNELS = "kernels/test_"

CHECKPOINTS: dict[str, tuple[str, ...]] = {
    "SD 1.x, a folder or a Hub id": cases(f"{PICTURES}test_sd1_and_sd2_style_models", "sd1-None"),
    "SD 2.x: v prediction, OpenCLIP": cases(f"{PICTURES}test_sd1_and_sd2_style_models", "sd2-None", "sd2-euler"),
    "SD 2.x: prompts padded with 0": cases(f"{FILES}test_tokens_are_transformers_own", "sd2-0"),
    "single file, SD 1.x's CLIP layout": cases(f"{FILES}test_diffusers_finds_the_same_tensors", "sd1"),
    "single file, SD 2.x's OpenCLIP layout": cases(f"{FILES}test_diffusers_finds_the_same_tensors", "sd2"),
    "single file without a network": cases(f"{FILES}test_the_picture_is_the_folder_s_without_a_network", "sd1"),
    "penultimate layer of OpenCLIP": cases(f"{FILES}test_what_is_of_no_use_is_left_out", "sd2"),
    "averaged weights (EMA)": (f"tests/{FILES}test_averaged_weights",),
    "pickled `.ckpt` and `.bin`, never code": (f"tests/{FILES}test_pickles_only_on_demand",),
    "inpainting checkpoint, 9 channels": cases("test_modes.py::test_inpainting_checkpoints", "1.0-1.0"),
    "inpainting checkpoint, single file": ("tests/checkpoints/test_single_file_faults.py::test_an_inpainting_unet",),
    "folder to single file": ("tests/checkpoints/test_convert.py::test_diffusers_opens_the_file",),
    "single file to folder, and back": (
        "tests/checkpoints/test_convert.py::test_the_small_model_draws_the_same_from_a_file_and_back",
    ),
    "text encoder": ("tests/models/test_clip.py::test_equals_transformers",),
    "UNet": ("tests/models/test_unet.py::test_equals_diffusers",),
    "VAE": ("tests/models/test_vae.py::test_moments_equal_diffusers", f"tests/{PICTURES}test_encode_and_decode_equal_diffusers"),
    "latent diffusion's KL family, f2 to f32": ("tests/models/test_vae_family.py::test_equals_diffusers_from_the_same_yaml",),
    "latent diffusion's VQ family, f4 to f16": (
        "tests/models/test_vq.py::test_decode_equals_diffusers",
        "tests/models/test_vq.py::test_quantise_equals_diffusers",
    ),
    "autoencoder files of latent diffusion": cases(
        "test_autoencoder.py::test_files_of_latent_diffusion", "kl-f4", "vq-f4", "kl-f16"
    ),
    "reconstruction and its error": ("tests/test_autoencoder.py::test_reconstruction_and_its_error",),
    "another VAE for a model": (
        "tests/checkpoints/test_vae_files.py::test_the_picture_is_that_of_diffusers_with_the_same_vae",
    ),
    "a model with a VQ autoencoder": cases("test_autoencoder.py::test_a_vq_model_draws_what_diffusers_draws", "text", "image"),
}  # fmt: skip

ADAPTERS: dict[str, tuple[str, ...]] = {
    "LoRA, kohya's files": (f"{LORA}test_kohya_files_are_merged_as_by_diffusers[sd1]",),
    "LoRA, diffusers' and PEFT's files": (f"{LORA}test_files_of_diffusers_trainers",),
    "several at once, each with its weight": (f"{LORA}test_kohya_files_are_merged_as_by_diffusers[sd2]",),
    "LoRA taken off, to the last bit": (f"{LORA}test_every_way_off_gives_the_first_bits_back",),
    "weights for each block": ("tests/test_adapters_blocks.py::test_each_form_is_diffusers",),
    "LoHa": cases(
        "test_adapters_lora.py::test_loha_and_lokr_are_pefts",
        "LoHa",
        "LoHa, convolution",
        "LoHa, convolution in Tucker form",
    ),
    "LoKr": cases(
        "test_adapters_lora.py::test_loha_and_lokr_are_pefts",
        "LoKr",
        "LoKr, both of low rank",
        "LoKr, convolution",
        "LoKr, convolution in Tucker form",
    ),
    "LoRA on the command line": ("tests/test_adapters_pipeline.py::test_the_command_line_takes_them",),
    "LoRA by a tag in the prompt": ("tests/test_prompt_tags.py::test_tags_load_what_they_name",),
    "textual inversion, both kinds of file": (
        "tests/test_adapters_textual_inversion.py::test_words_as_diffusers_learns_them",
    ),
}

PROMPTS: dict[str, tuple[str, ...]] = {
    "plain prompts, cut at 77 tokens": (
        "tests/test_prompt.py::test_plain_prompts_equal_transformers_and_have_no_syntax",
    ),
    "weights and escapes": cases(CHUNKS, "sd1-weights-0", "sd2-weights-0", "sd1-lone brackets-0", "sd1-a weight of 0-0"),
    "long prompts in chunks of 75": cases(CHUNKS, "sd1-long-0", "sd2-long, with weights-0", "sd1-no comma-0"),
    "BREAK": cases(CHUNKS, "sd1-break-0", "sd2-break-1"),
    "pictures of long and weighted prompts": (
        "tests/test_prompt.py::test_pictures_of_long_and_weighted_prompts_equal_diffusers",
    ),
    "negative prompt": cases(f"{PICTURES}test_arguments_mean_what_they_mean_in_diffusers", "negative prompt"),
    "clip_skip": (f"tests/{PICTURES}test_clip_skip_as_in_diffusers",),
    "embeddings in and out": (f"tests/{PICTURES}test_latents_embeds_and_generator_as_in_diffusers",),
    "several prompts, several images of each": (
        f"tests/{PICTURES}test_prompts_and_images_a_prompt_stand_as_in_diffusers",
    ),
}  # fmt: skip

SCHEDULES = ("uniform", "karras", "exponential", "sgm_uniform", "beta")
SAMPLING: dict[str, tuple[str, ...]] = {
    info.label: cases(PARITY, f"{info.id}-uniform-sd15") + cases(f"{PARITY}_in_float64", f"{info.id}-uniform-sd15")
    if info.diffusers_class
    else cases(PUBLISHED, f"{info.id}-uniform-epsilon-20", f"{info.id}-karras-v_prediction-20")
    for info in SAMPLERS.values()
}
SAMPLING |= {
    f"schedule {name}": cases(PARITY, f"euler-{name}-sd21") + cases(f"{PARITY}_in_float64", f"euler-{name}-sd15")
    for name in SCHEDULES
}
SAMPLING |= {
    "schedule simple": cases("sampling/test_sampler_parity.py::test_simple_schedule_is_the_web_uis_timesteps", "20-euler"),
    "schedule align_your_steps": cases(
        "sampling/test_sampler_parity.py::test_align_your_steps_schedule_is_the_published_levels", "10", "25"
    ),
    "timesteps of your own": cases("sampling/test_sampler_parity.py::test_chosen_timesteps_equal_diffusers", "euler"),
    "sigmas of your own": ("tests/sampling/test_sampler_parity.py::test_chosen_sigmas_equal_diffusers",),
    "zero terminal SNR": cases("sampling/test_sampler_parity.py::test_zero_terminal_snr_equals_diffusers", "trailing-ddim"),
    "guidance_rescale": cases(f"{PICTURES}test_arguments_mean_what_they_mean_in_diffusers", "guidance_rescale"),
    "no guidance, for few-step models": cases(
        f"{PICTURES}test_arguments_mean_what_they_mean_in_diffusers", "no guidance"
    ),
}  # fmt: skip

SEAMLESS = ("True", "x", "y")
MODES: dict[str, tuple[str, ...]] = {
    "image to image": cases("test_modes.py::test_image_to_image_with_every_sampler", "ddim-uniform", "dpmpp_2m-karras"),
    "image to image on the command line": (
        "tests/test_modes_promises.py::test_the_command_line_paints_in_a_picture",
    ),
    "inpainting, ordinary checkpoint": cases(
        "test_modes.py::test_inpainting_with_an_ordinary_checkpoint", "ddim-uniform-1.0", "euler_ancestral-uniform-0.3"
    ),
    "inpainting, 9-channel checkpoint": cases("test_modes.py::test_inpainting_checkpoints", "5.0-0.6", "5.0-1.0"),
    "unmasked pixels kept to the bit": ("tests/test_modes_promises.py::test_inpainting_leaves_what_is_not_masked",),
    "only the masked part": ("tests/test_modes.py::test_painting_a_part_alone",),
    "outpainting": ("tests/test_modes_promises.py::test_extend_gives_the_canvas_and_the_mask_of_what_is_new",),
    "hires fix on latents": (
        "tests/test_modes_promises.py::test_a_second_pass_is_image_to_image_on_the_enlarged_latents",
    ),
    "hires fix on the picture": ("tests/test_modes_promises.py::test_a_second_pass_on_the_enlarged_picture",),
    "variation seeds": ("tests/test_modes_promises.py::test_a_variation_lies_between_two_seeds",),
    "slerp of embeddings or latents": ("tests/test_modes_promises.py::test_slerp_goes_along_the_arc",),
    "a seed's image, alone or in a batch": cases("test_modes_promises.py::test_image_i_comes_out_alone", "False"),
    "one generator for a batch": (f"tests/{PICTURES}test_latents_embeds_and_generator_as_in_diffusers",),
    "seamless tiling": cases("test_seamless.py::test_pictures_equal_diffusers", *SEAMLESS),
    "large pictures through the VAE in tiles": (
        "tests/test_vae_tiles.py::test_decode_equals_diffusers",
        "tests/test_vae_tiles.py::test_a_sample_of_the_encoded_equals_diffusers",
    ),
    "tiles where memory runs out": ("tests/test_memory.py::test_a_large_picture_is_decoded_in_tiles",),
    "previews, linear": ("tests/test_previews.py::test_one_pixel_a_latent_is_the_mean_of_what_the_vae_decodes",),
    "previews, TAESD": (
        "tests/models/test_taesd.py::test_equals_diffusers",
        "tests/test_previews.py::test_taesd_equals_diffusers",
    ),
    "a GPU's random numbers on any machine": (
        "tests/test_philox.py::test_the_published_answers",
        "tests/test_philox.py::test_what_cuda_prints_for_seed_0",
    ),
    "Brownian noise for SDE samplers": ("tests/test_noise_brownian.py::test_dpmpp_sde_draws_what_diffusers_draws",),
    "requests of every kind in one batch": cases("test_mixed_batches.py::test_each_gets_what_it_gets_alone", "in order"),
    "replay of a picture's file": ("tests/test_replay.py::test_a_picture_of_ours_is_drawn_again",),
}  # fmt: skip

BACKENDS: dict[str, tuple[str, ...]] = {
    "backend reference: plain PyTorch": cases(f"{PICTURES}test_every_sampler_on_the_trained_model", "plms"),
    "backend onednn: packed weights": ("tests/models/test_unet.py::test_onednn_ops_equal_the_reference",),
    "backend triton: fastsd's kernels": ("tests/test_backends.py::test_a_picture_on_the_kernels",),
    "text encoder on the kernels": cases("models/test_triton_nets.py::test_text_encoder", "torch.float16"),
    "UNet on the kernels": cases("models/test_triton_nets.py::test_unet_step", "odd, masked context-torch.float16"),
    "VAE on the kernels": ("tests/models/test_triton_nets.py::test_vae_decode",),
    "the same check on your machine": ("tests/test_verify.py::test_the_bundled_model_passes",),
    "CUDA graphs": ("tests/test_graph.py::test_whatever_changes_reaches_the_buffers",),
}  # fmt: skip

HALF = ("torch.float32", "torch.float16")
PACKED = ("torch.float32", "torch.bfloat16")
OPS: dict[str, tuple[str, ...]] = {
    "linear, reference": cases("test_ops.py::test_linear", *(f"gelu-{dtype}-reference" for dtype in HALF)),
    "linear, onednn": cases(
        "test_ops.py::test_linear_large_enough_for_onednn", *(f"{dtype}-onednn" for dtype in PACKED)
    ),
    "linear, triton": cases(
        f"{KERNELS}gemm.py::test_linear", *(f"silu-tails on every side-{dtype}" for dtype in HALF)
    ),
    "geglu, reference": cases("test_ops.py::test_geglu", *(f"{dtype}-reference" for dtype in HALF)),
    "geglu, onednn": cases("test_ops.py::test_geglu", *(f"{dtype}-onednn" for dtype in PACKED)),
    "geglu, triton": cases(f"{KERNELS}geglu.py::test_geglu", *(f"tails on every side-{dtype}" for dtype in HALF)),
    "project_heads, reference": cases("test_ops.py::test_project_heads", *(f"True-{dtype}-reference" for dtype in HALF)),
    "project_heads, onednn": cases("test_ops.py::test_project_heads", *(f"True-{dtype}-onednn" for dtype in PACKED)),
    "project_heads, triton": cases(
        f"{KERNELS}heads.py::test_project_heads", *(f"40 in 48-True-{dtype}" for dtype in HALF)
    ),
    "attention, reference": cases("test_ops.py::test_attention", *(f"False-3-40-{dtype}" for dtype in HALF)),
    "attention, triton": cases(f"{KERNELS}flash_attn.py::test_parity", *(f"35-77-3-40-dtype{i}" for i in range(2))),
    "layer_norm, reference": cases("test_ops.py::test_layer_norm", *HALF),
    "layer_norm, triton": cases(f"{KERNELS}layernorm.py::test_shape", *(f"(7, 768)-{dtype}" for dtype in HALF)),
    "group_norm, reference": cases("test_ops.py::test_group_norm", *(f"100.0-True-{dtype}" for dtype in HALF)),
    "group_norm, triton": cases(
        f"{KERNELS}groupnorm_silu.py::test_width_of_a_group", *(f"20, skip-{dtype}" for dtype in HALF)
    ),
    "conv2d, reference": cases("test_ops.py::test_conv2d", *(f"UNet down-{dtype}-reference" for dtype in HALF)),
    "conv2d, onednn": cases("test_ops.py::test_conv2d", *(f"same-{dtype}-onednn" for dtype in PACKED)),
    "conv2d, triton": cases(f"{KERNELS}conv2d.py::test_epilogue", *(f"shortcut-chosen-{dtype}" for dtype in HALF)),
    "conv2d with edges that meet, triton": cases(
        f"{KERNELS}conv2d_wrap.py::test_conv2d", "stride 1-x", "stride 1-both", "stride 2 of the UNet-y"
    ),
    "conv2d_norm, reference": cases("test_ops.py::test_conv2d_norm", *(f"{dtype}-reference" for dtype in HALF)),
    "conv2d_norm, onednn": cases("test_ops.py::test_conv2d_norm", *(f"{dtype}-onednn" for dtype in PACKED)),
    "conv2d_norm, triton": cases(f"{KERNELS}conv2d.py::test_conv2d_norm", *(f"0.0-chosen-{dtype}" for dtype in HALF)),
    "upsample_conv2d, reference": cases(
        "test_ops.py::test_upsample_conv2d", *(f"None-{dtype}-reference" for dtype in HALF)
    ),
    "upsample_conv2d, onednn": cases(
        "test_ops.py::test_upsample_conv2d", *(f"None-{dtype}-onednn" for dtype in PACKED)
    ),
    "upsample_conv2d, triton": cases(
        f"{KERNELS}conv2d.py::test_upsample_conv2d", *(f"chosen-None-{dtype}" for dtype in HALF)
    ),
    "step_input, reference": ("tests/test_ops.py::test_step_input",),
    "step_input, triton": cases(f"{KERNELS}sampler_step.py::test_step_input", *(f"{dtype}-2-2-odd" for dtype in HALF)),
    "sampler_step, reference": ("tests/test_ops.py::test_sampler_step",),
    "sampler_step, triton": cases(
        f"{KERNELS}sampler_step.py::test_sampler_step", *(f"{dtype}-True-True-2-odd" for dtype in HALF)
    ),
}  # fmt: skip

TRAINING: dict[str, tuple[str, ...]] = {
    "a model from nothing": ("tests/training/test_run.py::test_fastsd_and_diffusers_draw_the_same_with_the_trained_model",),
    "its vocabulary": ("tests/training/test_vocabulary.py::test_transformers_gives_the_same_ids_for_every_caption",),
    "a LoRA for a model": (
        "tests/training/test_lora.py::test_diffusers_nets_with_the_file_predict_the_same",
        "tests/training/test_lora.py::test_diffusers_draws_with_the_file_what_the_trained_nets_draw",
    ),
    "a trained LoRA put on and taken off": (
        "tests/training/test_lora.py::test_fastsd_draws_with_the_file_what_the_trained_nets_draw",
    ),
    "an interrupted run goes on bit by bit": ("tests/training/test_run.py::test_it_goes_on_bit_by_bit",),
    "loss and gradients of the diffusion stage": (
        "tests/training/test_diffusion.py::test_a_step_s_loss_and_gradients_are_those_of_the_oracles_nets",
    ),
    "min-SNR weights": ("tests/training/test_diffusion.py::test_min_snr_weights_are_those_of_diffusers_script",),
    "loss of the autoencoder stage": ("tests/training/test_autoencoder.py::test_the_loss_is_that_of_diffusers_autoencoder",),
    "warm-up and cosine": ("tests/training/test_loop.py::test_the_learning_rate_is_that_of_torch_s_schedulers",),
}  # fmt: skip

TESTS: dict[str, tuple[str, ...]] = CHECKPOINTS | ADAPTERS | PROMPTS | SAMPLING | MODES | BACKENDS | OPS | TRAINING
