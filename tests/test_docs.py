"""docs/SUPPORT.md: every example runs, and its rows are those of the support matrix."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from typer.testing import CliRunner

import fastsd
from fastsd import cli
from fastsd.convert import convert
from fastsd.metadata import save_image
from fastsd.pipeline import BUNDLED
from fastsd.sampling import SAMPLERS, schedules
from tests import oracle
from tests.adapter_builders import kohya, kohya_lora, layers, save
from tests.checkpoints import single_files
from tests.checkpoints.checkpoint_builders import edit_json
from tests.models.test_vq import FAMILY as VQ
from tests.models.test_vq import vq_model
from tests.support_matrix import DOCUMENT, TESTS, read_rows
from tests.test_autoencoder import ldm_state, theirs_of
from tests.test_modes import half_mask, picture
from tests.training import builders

TEXT = DOCUMENT.read_text(encoding="utf-8")
PREAMBLE, *PARTS = TEXT.split("\n## ")
SECTIONS = {part.split("\n")[0]: part for part in PARTS}
OUTCOMES: dict[str, object] = {
    'fastsd.Pipeline.from_pretrained("sd2-folder").noise_schedule.prediction_type': "v_prediction",
    'fastsd.Pipeline("sd2-folder").tokenizer.pad_id': 0,
    'fastsd.Pipeline("sd2.safetensors").config.text_encoder.num_hidden_layers': 23,
    'fastsd.Pipeline("inpainting.safetensors").config.unet.in_channels': 9,
}
"""What the examples that ask for a value are told."""


class Quick(fastsd.Pipeline):
    """Two steps where an example does not say how many."""

    def generate(self, *prompts: Any, **arguments: Any) -> fastsd.Result:
        return super().generate(*prompts, **{"num_inference_steps": 2} | arguments)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all that the examples name."""
    path = tmp_path_factory.mktemp("docs")
    shutil.copytree(BUNDLED, path / "folder")
    convert(path / "folder", path / "model.safetensors")
    picture().save(path / "photo.png")
    half_mask().save(path / "mask.png")
    pipe = fastsd.Pipeline(device="cpu")
    made = pipe.generate("a circle", num_inference_steps=2, seed=1)
    save_image(made.images[0], path / "made.png", made.parameters[0])
    write_checkpoints(path)
    write_autoencoders(path)
    write_adapters(path, pipe)
    write_recipes(path)
    return path


def write_checkpoints(path: Path) -> None:
    for style, folder in {"sd1": "sd1-folder", "sd2": "sd2-folder"}.items():
        model = single_files.Model(path / style, style)
        shutil.move(model.folder, path / folder)
        shutil.move(model.file, path / model.file.name)
        if style == "sd1":
            torch.save({"state_dict": model.state}, path / "model.ckpt")
            ema = {f"model_ema.{key[6:].replace('.', '')}": x for key, x in model.state.items() if key[:6] == "model."}
            save(model.state | ema, path / "ema.safetensors")
            wide = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3, dtype=torch.float16)}
            save(model.state | wide, path / "inpainting.safetensors")
    oracle.save_random_model(path / "inpainting-folder", "sd1")
    oracle.unet(oracle.SD1_UNET | {"in_channels": 9}).save_pretrained(path / "inpainting-folder" / "unet")


def write_autoencoders(path: Path) -> None:
    save(ldm_state(theirs_of("kl-f4")), path / "kl-f4.safetensors")
    theirs_of("vq-f4").save_pretrained(path / "vq-folder")
    oracle.save_random_model(path / "vq-model", "sd1")
    vq_model(VQ["vq-f8"]).save_pretrained(path / "vq-model" / "vae")
    edit_json(path / "vq-model" / "model_index.json", vae=["diffusers", "VQModel"])
    shutil.copytree(BUNDLED / "vae", path / "vae-folder")
    blocks = {f"{part}_block_out_channels": (64,) * 4 for part in ("encoder", "decoder")}
    tiny = diffusers.AutoencoderTiny(**blocks, num_encoder_blocks=(1, 3, 3, 3), num_decoder_blocks=(3, 3, 3, 1))
    save(tiny.state_dict(), path / "taesd.safetensors")


def write_adapters(path: Path, pipe: fastsd.Pipeline) -> None:
    save(kohya_lora(pipe), path / "ink.safetensors")
    component, module, (out, into) = next(layers(pipe, ("attn1.to_q",)))
    name, generator = kohya(component, module), torch.Generator().manual_seed(0)

    def write(file: str, **shapes: tuple[int, int]) -> None:
        state = {f"{name}.{key}": torch.randn(shape, generator=generator) / 30 for key, shape in shapes.items()}
        save(state, path / file)

    low, high = (out, 2), (2, into)
    write("loha.safetensors", hada_w1_a=low, hada_w1_b=high, hada_w2_a=low, hada_w2_b=high)
    write("lokr.safetensors", lokr_w1=(4, 4), lokr_w2=(out // 4, into // 4))
    (path / "lora-folder").mkdir()
    factors = {f"unet.{module}.lora_A.weight": torch.randn(high), f"unet.{module}.lora_B.weight": torch.randn(low)}
    save(factors, path / "lora-folder" / "pytorch_lora_weights.safetensors")
    width = pipe.text_encoder.config.hidden_size
    save({"<any>": torch.randn(2, width, generator=generator)}, path / "thing.safetensors")


def write_recipes(path: Path) -> None:
    stages = builders.TEXT + builders.AUTOENCODER + builders.DIFFUSION
    made = builders.recipe_file(path / "model.toml", stages)
    made.write_text(made.read_text().replace('output = "runs"', 'output = "made"'))
    builders.picture_folder(path / "pictures")
    head = 'base = "folder"\nprocesses = 1'
    lora = builders.recipe_file(path / "lora.toml", builders.LORA, head, 'path = "pictures"')
    lora.write_text(lora.read_text().replace('output = "runs"', 'output = "made-lora"'))


def blocks(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_example_runs(section: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr(fastsd, "Pipeline", Quick)
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(blocks(PREAMBLE) + blocks(SECTIONS[section]), space)
    rows = read_rows(SECTIONS[section])
    assert rows, f"no table under {section}"
    for row in rows:
        example = row.example.strip("`")
        if example.startswith("fastsd "):
            done = CliRunner().invoke(cli.app, shlex.split(example)[1:])
            assert done.exit_code == 0, f"{row.feature}: {example}\n{done.output}"
            continue
        try:
            value = eval(example, space)
        except Exception as error:
            pytest.fail(f"{row.feature}: {example}\n{type(error).__name__}: {error}")
        if example in OUTCOMES:
            assert value == OUTCOMES[example], f"{row.feature}: {example}"


def test_what_is_documented_is_what_is_measured() -> None:
    features = [row.feature for row in read_rows(TEXT)]
    assert len(features) == len(set(features)), "a feature stands there twice"
    assert set(features) == TESTS.keys()
    assert all(row.oracle for row in read_rows(TEXT)), "a row does not say what it is compared with"
    for test in {test.partition("[")[0] for several in TESTS.values() for test in several}:
        file, _, function = test.partition("::")
        assert f"\ndef {function}(" in (DOCUMENT.parents[1] / file).read_text(encoding="utf-8"), f"there is no {test}"


def test_every_sampler_and_schedule_has_a_row() -> None:
    expected = {info.label for info in SAMPLERS.values()} | {f"schedule {name}" for name in schedules()}
    missing = expected - {row.feature for row in read_rows(TEXT)}
    assert not missing, f"docs/SUPPORT.md lacks {sorted(missing)}"
