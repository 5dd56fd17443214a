"""Recipes as TOML: what is read, and every complaint, which names the place and what would be right."""

import json
import tomllib
from pathlib import Path

import pytest

from fastsd.config import ModelConfig
from fastsd.errors import ParameterError
from fastsd.pipeline import BUNDLED
from fastsd.training import recipe as recipe_module
from fastsd.training.recipe import (
    STAGES,
    AutoencoderStage,
    DiffusionStage,
    LoraStage,
    Recipe,
    TextStage,
    read_recipe,
    typed,
)
from tests.training.builders import AUTOENCODER, CLIP, DIFFUSION, LORA, TEXT, UNET, VAE, recipe_file

BUNDLED_RECIPE = Path(recipe_module.__file__).parent / "recipes" / "shapes-128.toml"
SHORT = """
output = "out"
base = "some/model"
[data]
[[stages]]
kind = "lora"
fit = { steps = 10 }
"""


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(ParameterError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message, "the command line prints one line"
    return message


def test_a_short_recipe_has_the_defaults(tmp_path: Path) -> None:
    found = read(tmp_path, SHORT)
    (stage,) = found.stages
    assert isinstance(stage, LoraStage)
    assert (found.output, found.base, found.model, found.data.path) == ("out", "some/model", None, None)
    assert (stage.name, stage.rank, stage.alpha, stage.fit.steps, stage.fit.batch_size) == ("lora", 8, 8.0, 10, 32)
    assert stage.layers == ("to_q", "to_k", "to_v", "to_out.0")


def test_every_stage_is_read(tmp_path: Path) -> None:
    stages = read_recipe(recipe_file(tmp_path / "recipe.toml", TEXT + AUTOENCODER + DIFFUSION + LORA)).stages
    assert [type(stage) for stage in stages] == [TextStage, AutoencoderStage, DiffusionStage, LoraStage]
    _, autoencoder, diffusion, lora = stages
    assert (autoencoder.crop, autoencoder.loss.posterior_logvar, autoencoder.loss.l1) == (16, -4.0, 1.0)
    assert (diffusion.loss.measure, diffusion.loss.min_snr_gamma, diffusion.train_text_encoder) == ("v", 5.0, True)
    assert (lora.text_layers, lora.fit.learning_rate, lora.fit.sample_every) == (("q_proj", "out_proj"), 1e-3, 3)


def test_whole_numbers_are_numbers_and_lists_are_tuples(tmp_path: Path) -> None:
    text = SHORT.replace("steps = 10", "steps = 10, clip_norm = 2, betas = [0, 0.5]").replace(
        '"lora"', '"lora"\nalpha = 4'
    )
    (stage,) = read(tmp_path, text).stages
    assert isinstance(stage, LoraStage)
    assert (stage.alpha, stage.fit.clip_norm, stage.fit.betas) == (4.0, 2.0, (0.0, 0.5))
    assert type(stage.fit.clip_norm) is float


def test_the_bundled_recipe_is_read() -> None:
    found = read_recipe(BUNDLED_RECIPE)
    assert found.model is not None
    config = ModelConfig.from_json(found.model.text_encoder, found.model.unet, found.model.vae)
    assert config.unet.cross_attention_dim == config.text_encoder.hidden_size
    assert config.unet.sample_size * config.vae.downscale == found.data.resolution
    assert found.stages[0].kind == "text"
    learnt = [stage.kind for stage in found.stages].index("diffusion")
    later = [stage for stage in found.stages[learnt:] if isinstance(stage, AutoencoderStage)]
    assert later, "the decoder was not trained on latents as noisy as the UNet's"
    for stage in later:
        assert stage.loss.freeze_encoder, "the latents that the UNet learnt must stay what they were"


def test_the_bundled_model_has_the_recipe_s_nets() -> None:
    recipe = read_recipe(BUNDLED_RECIPE)
    assert recipe.model is not None
    unet = dict(recipe.model.unet)
    for stage in recipe.stages:
        if isinstance(stage, DiffusionStage) and stage.grow is not None:
            unet |= stage.grow
    for component, options in (("unet", unet), ("vae", recipe.model.vae)):
        written = json.loads((BUNDLED / component / "config.json").read_text(encoding="utf-8"))
        changed = {key for key, value in options.items() if written[key] != value} - {"scaling_factor"}
        assert not changed, f"{component}: the weights are of another recipe"


ADDED = {"\n[data]": "\n{}\n[data]", "[data]": "[data]\n{}\n", "[[stages]]": "[[stages]]\n{}\n"}
"""Where a line is put."""


@pytest.mark.parametrize(
    ("where", "line", "message"),
    [
        (
            "\n[data]",
            "colour = 1",
            "config: unknown 'colour'; it knows output, data, stages, base, model, samples, device",
        ),
        ("[data]", "sice = 1", "config.data: unknown 'sice'; it knows path, resolution, size, seed"),
        ("[data]", 'size = "1"', "config.data.size: must be an integer, not '1'"),
        ("[data]", "size = 1.0", "config.data.size: must be an integer, not 1.0"),
        ("[data]", "size = true", "config.data.size: must be an integer, not True"),
        ("[data]", "path = 3", "config.data.path: must be a string, not 3"),
        ("[data]", "resolution = 7", "config.data: resolution must be at least 8, size at least 1"),
        ("[data]", "size = 0", "config.data: resolution must be at least 8, size at least 1"),
        ("[data]", "seed = -1", "config.data: resolution must be at least 8, size at least 1, and no seed below 0"),
        ("\n[data]", "seed = -1", "config.data: resolution must be at least 8, size at least 1, and no seed below 0"),
        ("\n[data]", "model = {}", "config.model: unet is missing"),
        ("\n[data]", "samples = 3", "config.samples: must be a table, not 3"),
        ("\n[data]", "samples = { prompts = 'a' }", "config.samples.prompts: must be a list, not 'a'"),
        ("\n[data]", "samples = { prompts = ['a', 1] }", "config.samples.prompts[1]: must be a string, not 1"),
        ("\n[data]", "dtype = 'float64'", "config.dtype: must be one of float32, float16, bfloat16, not 'float64'"),
        ("\n[data]", "processes = 0", "config: processes must be at least 1 and threads at least 0"),
        ("\n[data]", "threads = -1", "config: processes must be at least 1 and threads at least 0"),
        ("\n[data]", "processes = 3", "config.stages.lora.fit.batch_size: 32 is not a multiple of 3 processes"),
        (
            "[[stages]]",
            "rang = 4",
            "config.stages[0]: unknown 'rang'; it knows kind, name, fit, loss, dropout, rank, alpha",
        ),
        ("[[stages]]", "rank = 0", "config.stages.lora: rank must be at least 1 and at most 4096, and alpha"),
        ("[[stages]]", "rank = 1000000", "config.stages.lora: rank must be at least 1 and at most 4096, and alpha"),
        ("[data]", "seed = 9223372036854775808", "config.data.seed: must fit in 64 bits, not 9223372036854775808"),
        ("[[stages]]", "alpha = 0.0", "config.stages.lora: rank must be at least 1 and at most 4096, and alpha"),
        ("[[stages]]", "alpha = '1'", "config.stages[0].alpha: must be a number, not '1'"),
        ("[[stages]]", "dropout = 1.0", "config.stages.lora.dropout: must be in [0, 1)"),
        ("[[stages]]", "brief_captions = 0.1", "config.stages[0]: unknown 'brief_captions'; it knows kind, name, fit"),
        (
            "[[stages]]",
            "loss = { measure = 'x' }",
            "config.stages[0].loss.measure: must be one of prediction, v, not 'x'",
        ),
        ("[[stages]]", "loss = { kl = 1.0 }", "config.stages[0].loss: unknown 'kl'; it knows measure, min_snr_gamma"),
        ("[[stages]]", "loss = { claims = -1 }", "config.stages.lora.loss.claims: must be at least 0"),
        (
            "[[stages]]",
            "loss = { min_snr_gamma = 0 }",
            "config.stages.lora.loss: min_snr_gamma and greatest_weight must",
        ),
        (
            "[[stages]]",
            "loss = { noise_bias = 99 }",
            "config.stages.lora.loss.noise_bias: 99.0 is not right; it must be",
        ),
        ("[[stages]]", "loss = { noise_bias = nan }", "config.stages[0].loss.noise_bias: must be a finite number"),
        ("\n[data]", "samples = { num_inference_steps = 0 }", "config.samples.num_inference_steps: 0 is out of range"),
        ("\n[data]", "samples = { guidance_scale = 1e5 }", "config.samples.guidance_scale: 100000.0 is not right"),
        ("\n[data]", "samples = { seed = -1 }", "config.samples.seed: -1 is out of range"),
        ("[[stages]]", "layers = 'to_q'", "config.stages[0].layers: must be a list, not 'to_q'"),
        ("[[stages]]", "name = 'start'", "config.stages: each needs a name of its own, and not start or model"),
        ("[[stages]]", "name = 'model'", "config.stages: each needs a name of its own"),
        ("[[stages]]", "name = ''", "config.stages: each needs a name of its own"),
        ("[[stages]]", "name = '../elsewhere'", "config.stages: each needs a name of its own"),
        ("[[stages]]", "name = '.'", "config.stages: each needs a name of its own"),
        ("[[stages]]", "name = 'start-vocabulary'", "config.stages: each needs a name of its own"),
    ],
)
def test_complaints(where: str, line: str, message: str, tmp_path: Path) -> None:
    found = complaint(tmp_path, SHORT.replace(where, ADDED[where].format(line), 1))
    assert found.startswith(message), found


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ("", ": steps is missing"),
        ("steps = 0", ".steps: must be at least 1"),
        ("steps = 9, batch_size = 0", ".batch_size: must be at least 1"),
        ("steps = 9, batch_size = 100000000000", ".batch_size: must be at most 65536"),
        ("steps = 9, checkpoint_every = 0", ".checkpoint_every: must be at least 1"),
        ("steps = 9, log_every = -1", ".log_every: must be at least 1"),
        ("steps = 9, learning_rate = 0", ": learning_rate must be in (0, 1)"),
        ("steps = 9, learning_rate = nan", ".learning_rate: must be a finite number, not nan"),
        ("steps = 9, clip_norm = inf", ".clip_norm: must be a finite number, not inf"),
        ("steps = 9, ema_decay = 1.0", ": learning_rate must be in (0, 1), ema_decay in [0, 1)"),
        ("steps = 9, ema_ramp = 0", ".ema_ramp: must be above 0"),
        ("steps = 9, warmup_steps = -1", ": learning_rate must be"),
        ("steps = 9, clip_norm = -0.5", ": learning_rate must be"),
        ("steps = 9, betas = [0.9, 1.0]", ": betas must be in [0, 1)"),
        ("steps = 9, betas = [0.9]", ".betas: must be a list, not [0.9]"),
        ("steps = 9, final_rate = 1.5", ": betas must be in [0, 1), final_rate in [0, 1]"),
        ("steps = 9, weight_decay = -1", ": betas must be in [0, 1), final_rate in [0, 1], weight_decay at least 0"),
        ("steps = 9, seed = -1", ": seed, sample_every and workers must be at least 0"),
        ("steps = 9, sample_every = -1", ": seed, sample_every and workers must be at least 0"),
        ("steps = 9, workers = -1", ": seed, sample_every and workers must be at least 0"),
        ("steps = 9, precision = 'int8'", ".precision: must be one of fp32, bf16, fp16, not 'int8'"),
        ("steps = 9, momentum = 0.9", ": unknown 'momentum'; it knows steps, batch_size, learning_rate"),
    ],
)
def test_complaints_about_fitting(fit: str, message: str, tmp_path: Path) -> None:
    found = complaint(tmp_path, SHORT.replace("steps = 10", fit))
    assert found.startswith((f"config.stages.lora.fit{message}", f"config.stages[0].fit{message}")), found


def test_weights_of_an_autoencoder_s_loss_are_no_less_than_0(tmp_path: Path) -> None:
    text = SHORT.replace('kind = "lora"', 'kind = "autoencoder"\nloss = { posterior_logvar = -4.6, kl = -1.0 }')
    assert complaint(tmp_path, text) == "config.stages.autoencoder.loss.kl: must be at least 0"


@pytest.mark.parametrize("output", ["", " "])
def test_an_output_has_a_name(output: str, tmp_path: Path) -> None:
    assert complaint(tmp_path, SHORT.replace('"out"', f'"{output}"')) == "config.output: must name a folder"


def test_brief_captions_are_a_share(tmp_path: Path) -> None:
    text = SHORT.replace('kind = "lora"', 'kind = "diffusion"\nbrief_captions = 1.5')
    assert complaint(tmp_path, text).endswith(".brief_captions: must be in [0, 1]")


def test_a_stage_s_fit_is_needed(tmp_path: Path) -> None:
    assert complaint(tmp_path, SHORT.replace("fit =", "# fit =")) == "config.stages[0]: fit is missing"


@pytest.mark.parametrize("crop", [7, 33])
def test_crops_are_no_larger_than_the_pictures(crop: int, tmp_path: Path) -> None:
    stages = AUTOENCODER.replace("crop = 16", f"crop = {crop}")
    with pytest.raises(
        ParameterError, match=r"^config\.stages\.autoencoder\.crop: must be from 8 to the resolution, 32$"
    ):
        read_recipe(recipe_file(tmp_path / "recipe.toml", stages))


@pytest.mark.parametrize("kind", ["", "kind = 'vae'", "kind = 1"])
def test_the_kinds_of_stages_are_named(kind: str, tmp_path: Path) -> None:
    found = complaint(tmp_path, SHORT.replace('kind = "lora"', kind))
    assert found.startswith(
        "config.stages[0]: kind must be one of text, autoencoder, diffusion, lora, not ".replace(
            "text, autoencoder, diffusion, lora", ", ".join(STAGES)
        )
    )


def test_a_stage_that_is_no_table(tmp_path: Path) -> None:
    text = SHORT.split("[[stages]]")[0].replace("\n[data]", "\nstages = [3]\n[data]")
    assert complaint(tmp_path, text).startswith("config.stages[0]: kind must be one of")


def test_either_a_base_or_a_new_model(tmp_path: Path) -> None:
    message = "config: needs either base, a model to begin from, or [model], the configs of a new one"
    assert complaint(tmp_path, SHORT.replace('base = "some/model"', "")) == message
    both = recipe_file(tmp_path / "both.toml", TEXT)
    both.write_text('base = "some/model"\n' + both.read_text())
    with pytest.raises(ParameterError) as caught:
        read_recipe(both)
    assert str(caught.value) == message


@pytest.mark.parametrize("stages", ["", "stages = []"])
def test_without_stages_there_is_nothing_to_train(stages: str, tmp_path: Path) -> None:
    found = complaint(tmp_path, SHORT.split("[[stages]]")[0].replace("\n[data]", f"\n{stages}\n[data]"))
    assert found in ("config: stages is missing", "config: has no [[stages]]; there is nothing to train")


def test_a_lora_is_the_last(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"^config\.stages: a lora stage must be the last"):
        read_recipe(recipe_file(tmp_path / "recipe.toml", LORA + TEXT))


def test_two_stages_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"^config\.stages: each needs a name of its own"):
        read_recipe(recipe_file(tmp_path / "recipe.toml", TEXT + TEXT))


def test_a_stage_is_named_for_its_kind_unless_it_says_otherwise(tmp_path: Path) -> None:
    two = TEXT.replace('name = "text"', "") + TEXT.replace('name = "text"', 'name = "again"')
    found = read_recipe(recipe_file(tmp_path / "recipe.toml", two))
    assert [stage.name for stage in found.stages] == ["text", "again"]


def test_what_is_no_recipe_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(ParameterError, match=r"^config: '.*missing\.toml' cannot be read: No such file or directory$"):
        read_recipe(missing)
    assert "is no TOML" in complaint(tmp_path, "output = ")
    (tmp_path / "latin.toml").write_bytes("output = 'é'".encode("latin-1"))
    with pytest.raises(ParameterError, match="is no TOML"):
        read_recipe(tmp_path / "latin.toml")
    with pytest.raises(ParameterError, match="cannot be read"):
        read_recipe(tmp_path)


def test_what_is_no_table_is_none_of_its_fields() -> None:
    with pytest.raises(ParameterError, match=r"^here: must be a table, not \[1\]$"):
        typed(Recipe, [1], "here")


def test_configs_of_nets_are_passed_on_as_they_are(tmp_path: Path) -> None:
    found = read_recipe(recipe_file(tmp_path / "recipe.toml", TEXT)).model
    assert found is not None
    assert (found.unet, found.vae, found.text_encoder) == (UNET, VAE, CLIP)
    assert tomllib.loads(recipe_file(tmp_path / "again.toml", TEXT).read_text())["model"]["unet"] == UNET
