"""A recipe from its first stage to a model: what is written, who can read it, and that it goes on where it stopped."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import fastsd
from fastsd.errors import CheckpointError, ParameterError
from fastsd.training import latents, run
from fastsd.training.autoencoder import as_tensor
from fastsd.training.model import load_model
from fastsd.training.recipe import Recipe
from fastsd.training.run import train
from tests.measured import measured
from tests.oracle import assert_same_picture, load_pipeline, nchw
from tests.tolerances import NET
from tests.training.builders import (
    AUTOENCODER,
    DIFFUSION,
    LORA,
    TEXT,
    checkpoint,
    differing,
    drawings,
    files,
    logged,
    picture_folder,
    recipe,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STAGES = ("text", "autoencoder", "diffusion")


def based_on(path: Path) -> str:
    return f"base = {json.dumps(str(path))}"


def pictures_of(path: Path) -> str:
    return f"path = {json.dumps(str(path))}"


def results(folder: Path) -> dict[str, Any]:
    """All that a run computes: weights of each stage and of the end, checkpoints, losses, samples, latents."""
    runs = folder / "runs"
    found: dict[str, Any] = {}
    for pattern in ("*.safetensors", "*.jsonl", "samples/*.png", "*.npy", "config.json"):
        found |= files(runs, pattern)
    return found | {
        f"{stage}/{name}": checkpoint(runs / stage)[name] for stage in STAGES for name in ("weights", "ema")
    }


def drawn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same picture by fastsd and by diffusers' StableDiffusionPipeline, both in fp32."""
    asked: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe = fastsd.Pipeline(path, device="cpu", dtype="float32", backend="reference")
    ours = pipe.generate("a red circle", latents=noise, sampler="ddim", **asked).images[0]
    return np.asarray(ours), load_pipeline(path)("a red circle", latents=noise, **asked).images[0]


def test_fastsd_and_diffusers_draw_the_same_with_the_trained_model(whole_run: Path) -> None:
    ours, theirs = drawn(whole_run / "runs" / "model")
    assert theirs.std() > 0.02, "the picture is of one colour, so this tells nothing"
    assert_same_picture(ours, theirs, "the model that was trained from nothing")


def test_the_model_is_in_the_dtype_that_was_asked_for(whole_run: Path) -> None:
    for path in (whole_run / "runs" / "model").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in safetensors.torch.load_file(path).values()} == {torch.float16}, path
    config = json.loads((whole_run / "runs" / "model" / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_each_stage_trains_its_own_nets_and_hands_on_the_others(whole_run: Path) -> None:
    """By the bits of the written files: which component differs from what the stage before has written."""
    trained = {"text": {"text_encoder"}, "autoencoder": {"vae"}, "diffusion": {"unet", "text_encoder"}}
    before = files(whole_run / "runs" / "start")
    for stage, components in trained.items():
        after = files(whole_run / "runs" / stage / "model")
        changed = {path.split("/")[0] for path in after if after[path] != before[path]}
        assert changed == components, stage
        before = after


def test_what_is_written_is_the_moving_average(whole_run: Path) -> None:
    state = checkpoint(whole_run / "runs" / "text")
    written = safetensors.torch.load_file(whole_run / "runs" / "text" / "model" / "text_encoder" / "model.safetensors")
    average = {
        name.replace("text_encoder.", "text_model."): t for name, t in state["ema"].items() if "heads" not in name
    }
    assert not differing(written, average)


def test_a_stage_shows_itself(whole_run: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = {}
    for path in sorted((whole_run / "runs").rglob("*.png")):
        with Image.open(path) as image:
            sizes[str(path.relative_to(whole_run / "runs"))] = image.size
            assert np.asarray(image.convert("L")).std() > 5, f"{path} is blank"
    assert sizes.pop("autoencoder/samples/000002.png") == (8 * 32, 2 * 32), "eight pictures above their reconstructions"
    assert sizes.pop("diffusion/samples/000003.png") == (2 * 34, 32 + 2 + 3 * 12), "two prompts, in up to three lines"
    assert set(sizes) == {f"{stage}/losses.png" for stage in STAGES}


def test_every_value_of_every_step_is_logged(whole_run: Path) -> None:
    names = {
        "text": ["loss", "read"],
        "autoencoder": ["loss", "l1", "kl", "psnr"],
        "diffusion": ["loss", "mse", "read"],
    }
    for stage, own in names.items():
        lines = logged(whole_run / "runs" / stage)
        assert [list(line) for line in lines] == [["step", *own, "norm", "rate"]] * 3
        assert [line["step"] for line in lines] == [1, 2, 3]


def test_latents_are_the_means_that_diffusers_vae_gives(whole_run: Path) -> None:
    """Scaled, in float16: half a unit in its last place is 2⁻¹¹ of a value, or 2⁻²⁵."""
    theirs = diffusers.AutoencoderKL.from_pretrained(whole_run / "runs" / "autoencoder" / "model" / "vae")
    images = torch.stack([as_tensor(drawings().image(index)) for index in range(12)])
    with torch.no_grad():
        wanted = theirs.encode(nchw(images)).latent_dist.mean * theirs.config.scaling_factor
    found = np.load(next((whole_run / "runs").glob("latents-*.npy")))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), rtol=2**-11, atol=NET)
    assert wanted.std().item() == pytest.approx(1, abs=0.01), "the scale was measured so that they have unit variance"


def test_the_autoencoder_s_posterior_is_that_of_its_training(whole_run: Path) -> None:
    theirs = diffusers.AutoencoderKL.from_pretrained(whole_run / "runs" / "autoencoder" / "model" / "vae")
    logvar = theirs.encode(torch.randn(1, 3, 32, 32)).latent_dist.logvar
    assert (logvar.min().item(), logvar.max().item()) == pytest.approx((-4, -4), abs=1e-6)


def test_a_frozen_encoder_keeps_its_scale(whole_run: Path, tmp_path: Path) -> None:
    """The UNet has learnt these latents: another scale would spoil every picture."""
    base = whole_run / "runs" / "autoencoder" / "model"
    stages = AUTOENCODER.replace("posterior_logvar = -4.0", "freeze_encoder = true")
    assert train(recipe(tmp_path, stages, based_on(base)))
    written = tmp_path / "runs" / "autoencoder" / "model" / "vae"
    assert (written / "config.json").read_text() == (base / "vae" / "config.json").read_text()
    before, after = (safetensors.torch.load_file(next(p.glob("*.safetensors"))) for p in (base / "vae", written))
    changed = {place.strip("/").split(".")[0] for place in differing(after, before)}
    assert changed == {"decoder", "post_quant_conv"}


def test_it_goes_on_bit_by_bit(whole_run: Path, tmp_path: Path) -> None:
    """Two steps a call, of three a stage: it stops within each stage."""
    small = recipe(tmp_path, TEXT + AUTOENCODER + DIFFUSION)
    done = [train(small, stop_after=2) for _ in range(4)]
    assert done == [False, False, False, True]
    ours, theirs = results(tmp_path), results(whole_run)
    measured("values differ", len(differing(ours, theirs)), 0)
    assert not differing(ours, theirs)
    assert len(theirs) > 25, "some of the results were not found"


GROWN = """
[stages.grow]
up_block_types = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
"""


def test_a_unet_grows_and_goes_on_bit_by_bit(trained_folder: Path, tmp_path: Path) -> None:
    stages = DIFFUSION + GROWN + DIFFUSION.replace('name = "diffusion"', 'name = "after"')
    runs = []
    for name, stop_after in (("whole", None), ("parts", 2)):
        (tmp_path / name).mkdir()
        small = recipe(tmp_path / name, stages, based_on(trained_folder))
        while not train(small, stop_after=stop_after):
            pass
        runs.append(files(tmp_path / name / "runs", "*.safetensors") | files(tmp_path / name / "runs", "samples/*.png"))
    assert not differing(runs[1], runs[0])
    grown, trained = (files(path / "unet", "config.json") for path in (tmp_path / "whole/runs/model", trained_folder))
    assert grown != trained, "the model that is written is not the grown one"
    unet = safetensors.torch.load(runs[0]["after/model/unet/diffusion_pytorch_model.safetensors"])
    assert unet["up_blocks.1.attentions.0.proj_out.weight"].any(), "what has grown was not trained"
    assert_same_picture(*drawn(tmp_path / "whole" / "runs" / "model"), "the model whose UNet has grown")


def test_a_finished_run_is_left_as_it_is(whole_run: Path) -> None:
    before = results(whole_run)
    times = {path: path.stat().st_mtime_ns for path in (whole_run / "runs").rglob("checkpoint.pt")}
    assert train(recipe(whole_run, TEXT + AUTOENCODER + DIFFUSION))
    assert not differing(results(whole_run), before)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "a stage was trained again"


def test_a_lost_result_is_written_again(new_folder: Path, tmp_path: Path) -> None:
    """As after a crash between a stage's last step and the writing of its model."""
    small = recipe(tmp_path, TEXT, based_on(new_folder))
    assert train(small)
    model = tmp_path / "runs" / "text" / "model"
    before = files(model)
    model.rename(tmp_path / "lost")
    assert train(small)
    assert files(model) == before


def test_a_stage_that_is_added_later_makes_another_model(new_folder: Path, tmp_path: Path) -> None:
    assert train(recipe(tmp_path, TEXT, based_on(new_folder)))
    before = files(tmp_path / "runs" / "model")
    assert train(recipe(tmp_path, TEXT + AUTOENCODER, based_on(new_folder)))
    after = files(tmp_path / "runs" / "model")
    assert {path.split("/")[0] for path in after if after[path] != before[path]} == {"vae"}, "model/ is the old one"
    assert not [path.name for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")], (
        "something is left over"
    )


@pytest.mark.parametrize("change", ["rate", "dropout", "data", "processes", "base"])
def test_another_config_of_a_begun_stage_is_refused(change: str, new_folder: Path, tmp_path: Path) -> None:
    small = recipe(tmp_path, TEXT, based_on(new_folder))
    assert not train(small, stop_after=1)
    (stage,) = small.stages
    fit = stage.fit
    changed: dict[str, Recipe] = {
        "rate": replace(small, stages=(replace(stage, fit=replace(fit, learning_rate=2e-3)),)),
        "dropout": replace(small, stages=(replace(stage, dropout=0.5),)),  # type: ignore[call-arg]
        "data": replace(small, data=replace(small.data, size=13)),
        "processes": replace(small, processes=2),
        "base": replace(small, base=str(shutil.copytree(new_folder, tmp_path / "other"))),
    }
    with pytest.raises(ParameterError, match=r"^output: text/ was begun with another config or other data; remove it"):
        train(changed[change])
    assert train(small), "the refusal has spoilt the run"


def test_what_does_not_change_the_result_may_change(new_folder: Path, tmp_path: Path) -> None:
    small = recipe(tmp_path, TEXT, based_on(new_folder))
    assert not train(small, stop_after=1)
    (stage,) = small.stages
    fit = replace(stage.fit, log_every=2, checkpoint_every=1, sample_every=1, workers=1)
    samples = replace(small.samples, prompts=())
    assert train(replace(small, stages=(replace(stage, fit=fit),), samples=samples, dtype="float32", threads=1))


@pytest.mark.parametrize("change", ["model", "seed"])
def test_another_config_of_the_beginning_is_refused(change: str, tmp_path: Path) -> None:
    small = recipe(tmp_path, TEXT)
    assert not train(small, stop_after=1)
    assert small.model is not None
    unet = small.model.unet | {"block_out_channels": [8, 8]}
    changed = {"model": replace(small, model=replace(small.model, unet=unet)), "seed": replace(small, seed=1)}
    with pytest.raises(ParameterError, match=r"^output: start/ was made for another \[model\], \[data\] or seed"):
        train(changed[change])


@pytest.fixture(scope="module")
def lora_run(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for pictures of one's own, of a model in a folder, in fp32."""
    folder = tmp_path_factory.mktemp("lora")
    pictures = pictures_of(picture_folder(folder / "pictures"))
    assert train(replace(recipe(folder, LORA, based_on(trained_folder), pictures), dtype="float32"))
    return folder


def test_a_lora_is_for_the_model_it_began_from(lora_run: Path, trained_folder: Path) -> None:
    """The last sample was drawn on the way, with the average as it then was: by the same steps with the file it is the same."""
    runs = lora_run / "runs"
    assert [path.name for path in runs.iterdir() if path.is_dir()] == ["lora"], "a LoRA leaves no model"
    pipe = fastsd.Pipeline(trained_folder, device="cpu", dtype="float32")
    asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 0}
    plain = [np.asarray(image) for image in pipe.generate(["a red circle", "two green hearts"], **asked).images]
    pipe.load_lora_weights(runs / "lora" / "lora.safetensors")
    images = [np.asarray(image) for image in pipe.generate(["a red circle", "two green hearts"], **asked).images]
    assert any(not np.array_equal(a, b) for a, b in zip(images, plain, strict=True)), "the LoRA changes nothing"
    with Image.open(runs / "lora" / "samples" / "000003.png") as sheet:
        shown = np.asarray(sheet)
    for index, image in enumerate(images):
        assert np.array_equal(shown[:32, index * 34 : index * 34 + 32], image), f"sample {index} is another picture"
    assert [path.name for path in (runs / "lora" / "samples").iterdir()] == ["000003.png"]


def test_a_lora_is_also_read_by_diffusers(lora_run: Path, trained_folder: Path) -> None:
    pipe = load_pipeline(trained_folder)
    pipe.load_lora_weights(lora_run / "runs" / "lora", weight_name="lora.safetensors")
    assert pipe.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}


def test_two_processes_share_the_work(trained_folder: Path, tmp_path: Path) -> None:
    """One picture: the first process has none of it to encode. Weights as of one process, but for rounding."""
    pictures = pictures_of(picture_folder(tmp_path / "pictures", 1))
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder, processes in ((one, 1), (two, 2)):
        folder.mkdir()
        small = recipe(folder, LORA.replace("sample_every = 3", "sample_every = 0"), based_on(trained_folder), pictures)
        assert train(replace(small, processes=processes, threads=1, dtype="float32"))
    latents = [np.load(next((folder / "runs").glob("latents-*.npy"))) for folder in (one, two)]
    assert np.array_equal(*latents)
    assert len(latents[0]) == 1
    weights = [safetensors.torch.load_file(folder / "runs" / "lora" / "lora.safetensors") for folder in (one, two)]
    for name, tensor in weights[0].items():
        error = ((weights[1][name] - tensor).norm() / tensor.norm()).item()
        assert error < 1e-3, (
            f"{name}: relative error {error:.1e} against one process"
        )  # AdamW divides tiny by tiny at first
    assert not list((two / "runs").rglob("*.tmp*")), "something is left over"


def test_other_pictures_than_at_the_beginning_are_refused(trained_folder: Path, tmp_path: Path) -> None:
    """What was learnt of the first would be mixed with the others."""
    pictures = picture_folder(tmp_path / "pictures")
    small = recipe(tmp_path, LORA, based_on(trained_folder), pictures_of(pictures))
    assert not train(small, stop_after=1)
    (pictures / "00.png").write_bytes((pictures / "0.png").read_bytes())
    (pictures / "00.txt").write_text("one more")
    with pytest.raises(ParameterError, match=r"^output: lora/ was begun with another config or other data; remove it"):
        train(small)


def test_a_full_disk_is_told_before_latents_are_computed(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a mapped file that the disk has no room for ends the process; so room is taken first."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(latents.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"^latents-.*\.npy: cannot be written: No space left on device$"):
        latents.cached_latents(load_model(trained_folder, torch.device("cpu")), drawings(), {}, tmp_path)
    assert not list(tmp_path.glob("latents*")), "something is left over"


@pytest.mark.parametrize("change", ["picture", "name", "caption"])
def test_as_many_other_pictures_are_refused(change: str, trained_folder: Path, tmp_path: Path) -> None:
    """Their latents would stand beside the others' captions."""
    pictures = picture_folder(tmp_path / "pictures")
    text = based_on(trained_folder)
    assert not train(recipe(tmp_path, LORA, text, pictures_of(pictures)), stop_after=1)
    if change == "picture":
        Image.new("RGB", (32, 32), "white").save(pictures / "1.png")
    if change == "name":
        for suffix in (".png", ".txt"):
            (pictures / f"1{suffix}").rename(pictures / f"9{suffix}")
    if change == "caption":
        (pictures / "1.txt").write_text("something else")
    with pytest.raises(ParameterError, match=r"^output: lora/ was begun with another config or other data; remove it"):
        train(recipe(tmp_path, LORA, text, pictures_of(pictures)))
    shutil.rmtree(tmp_path / "runs" / "lora")
    assert not train(recipe(tmp_path, LORA, text, pictures_of(pictures)), stop_after=1)
    assert len(list((tmp_path / "runs").glob("latents-*.npy"))) == 2, "the former pictures' latents were taken"


def test_other_drawings_of_one_s_own_are_refused(trained_folder: Path, tmp_path: Path) -> None:
    small = recipe(tmp_path, LORA, based_on(trained_folder))
    assert not train(small, stop_after=1, dataset=drawings())
    other = drawings()
    other.seed += 1
    with pytest.raises(ParameterError, match=r"^output: lora/ was begun with another config or other data"):
        train(small, dataset=other)


def test_a_first_try_that_failed_may_be_mended(trained_folder: Path, tmp_path: Path) -> None:
    wrong = LORA.replace("rank =", 'layers = ["to_qq"]\nrank =')
    with pytest.raises(ParameterError, match="to_qq"):
        train(recipe(tmp_path, wrong, based_on(trained_folder)))
    assert not train(recipe(tmp_path, LORA, based_on(trained_folder)), stop_after=1)


def test_all_that_is_trained_is_on_the_nets_device(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On "meta" in the place of a GPU: what a task adds to the nets, its tables and heads, must be moved as well."""
    seen: list[torch.nn.Module] = []

    def look(task: torch.nn.Module, *rest: Any) -> bool:
        seen.append(task)
        return False

    monkeypatch.setattr(run, "_own_device", lambda recipe: torch.device("meta"))
    monkeypatch.setattr(run, "cached_latents", lambda *args: np.zeros((1, 16, 16, 4), np.float16))
    monkeypatch.setattr(run, "fit", look)
    monkeypatch.setattr(run.report, "draw_losses", lambda folder: None)
    for number, stages in enumerate((TEXT, AUTOENCODER, DIFFUSION, LORA)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert not train(recipe(folder, stages, based_on(trained_folder)))
        devices = {t.device.type for t in (*seen[-1].parameters(), *seen[-1].buffers())}
        assert devices == {"meta"}, f"{type(seen[-1]).__name__}: parts of it stayed on {devices - {'meta'}}"


@pytest.mark.parametrize("stages", [TEXT, DIFFUSION], ids=["text", "claims"])
def test_folders_do_not_say_what_captions_state(stages: str, trained_folder: Path, tmp_path: Path) -> None:
    pictures = pictures_of(picture_folder(tmp_path / "pictures"))
    with pytest.raises(
        ParameterError, match=r"^config\.stages\.(text|diffusion): the data set does not say what its captions"
    ):
        train(recipe(tmp_path, stages, based_on(trained_folder), pictures))


def test_folders_have_no_brief_captions(trained_folder: Path, tmp_path: Path) -> None:
    stages = DIFFUSION.replace("claims = 0.01", "claims = 0.0").replace(
        "[[stages]]", "[[stages]]\nbrief_captions = 0.5"
    )
    pictures = pictures_of(picture_folder(tmp_path / "pictures"))
    with pytest.raises(ParameterError, match=r"^config\.stages\.diffusion\.brief_captions: the data set has none"):
        train(recipe(tmp_path, stages, based_on(trained_folder), pictures))


def test_a_lora_of_nothing_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    stages = LORA.replace('text_layers = ["q_proj", "out_proj"]', "layers = []")
    with pytest.raises(ParameterError, match=r"^config\.stages\.lora: layers and text_layers name no layer"):
        train(recipe(tmp_path, stages, based_on(trained_folder)))


@pytest.mark.parametrize(
    ("stages", "resolution", "name"),
    [
        (AUTOENCODER.replace("crop = 16", "crop = 15"), 32, r"stages\.autoencoder\.crop"),
        (DIFFUSION, 33, r"data\.resolution"),
    ],
)
def test_sides_that_the_autoencoder_cannot_halve(
    stages: str, resolution: int, name: str, trained_folder: Path, tmp_path: Path
) -> None:
    small = recipe(tmp_path, stages, based_on(trained_folder))
    with pytest.raises(ParameterError, match=rf"^config\.{name}: \d+ is not a multiple of 2, the autoencoder's factor"):
        train(replace(small, data=replace(small.data, resolution=resolution)))


def test_an_output_that_is_a_file(trained_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(ParameterError, match=r"^output: '.*runs' cannot be made a folder: File exists$"):
        train(recipe(tmp_path, LORA, based_on(trained_folder)))


def test_a_base_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-model"):
        train(recipe(tmp_path, TEXT, based_on(tmp_path / "no-model")))


def test_stop_after_counts_the_steps_of_each_stage(tmp_path: Path, new_folder: Path) -> None:
    """stop_after is of the stage at hand: one that ends just there is done, and the next begins."""
    two = TEXT + TEXT.replace('name = "text"', 'name = "more"')
    small = recipe(tmp_path, two, based_on(new_folder))
    assert not train(small, stop_after=2)
    assert not (tmp_path / "runs" / "more").exists()
    assert not train(small, stop_after=2)
    assert checkpoint(tmp_path / "runs" / "more")["step"] == 2
    assert train(small, stop_after=2)


def test_reconstructions_are_drawn_without_prompts(trained_folder: Path, tmp_path: Path) -> None:
    small = recipe(tmp_path, AUTOENCODER, based_on(trained_folder))
    assert train(replace(small, samples=replace(small.samples, prompts=())))
    assert (tmp_path / "runs" / "autoencoder" / "samples" / "000002.png").is_file()
