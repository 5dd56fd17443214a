"""Folder to single file and back: the same tensors, configs and pictures; whole or not at all; nothing replaced unasked."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch

import fastsd
from fastsd import cli
from fastsd.checkpoints import open_folder, open_single_file
from fastsd.checkpoints.file_parts import CONFIGS
from fastsd.convert import convert
from fastsd.errors import CheckpointError, ParameterError
from tests.checkpoints import single_files
from tests.checkpoints.checkpoint_builders import COMPONENTS, UNET, edit_json, split
from tests.oracle import assert_equal
from tests.small_model import SMALL_MODEL

OPTIONS = {"device": "cpu", "dtype": "float32", "backend": "reference"}
DRAWING = {"num_inference_steps": 1, "seed": 0, "output_type": "np"}


@pytest.fixture(scope="module")
def small_model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(SMALL_MODEL, tmp_path_factory.mktemp("small") / "shapes.safetensors")


@pytest.fixture
def file(small_model_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(small_model_file, tmp_path / "model.safetensors"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the small model that may be changed."""
    return Path(shutil.copytree(SMALL_MODEL, tmp_path / "model"))


def draw(model: Path) -> bytes:
    images = fastsd.Pipeline(model, **OPTIONS).generate("a red circle on a white background", **DRAWING).images
    assert images.std() > 0.01, "an empty picture compares nothing"
    return images.tobytes()


def assert_same_model(found: Path, expected: Path) -> None:
    """Two folders: the same tensors under the same names, and the same configs and tokenizer."""
    states = single_files.folder_state(expected)
    for component, state in single_files.folder_state(found).items():
        single_files.assert_same_tensors(state, states[component], component)
    ours, theirs = open_folder(found), open_folder(expected)
    for name in CONFIGS:
        assert getattr(ours, name) == getattr(theirs, name), name
    for path in sorted((expected / "tokenizer").iterdir()):
        assert (found / "tokenizer" / path.name).read_bytes() == path.read_bytes(), path.name


# What is right


def test_the_small_model_draws_the_same_from_a_file_and_back(small_model_file: Path, tmp_path: Path) -> None:
    folder = convert(small_model_file, tmp_path / "folder")
    assert_same_model(folder, SMALL_MODEL)
    pictures = {str(path): draw(path) for path in (SMALL_MODEL, small_model_file, folder)}
    for path, picture in pictures.items():
        assert_equal(picture, pictures[str(SMALL_MODEL)], f"the picture of {path}")
    again = convert(folder, tmp_path / "again.safetensors")
    assert again.read_bytes() == small_model_file.read_bytes(), "the same model gives the same file"


def test_files_may_be_read_by_those_who_may_read_any_other(small_model_file: Path, tmp_path: Path) -> None:
    """safetensors 0.8 alone writes files that only their owner may read."""
    folder, other = convert(small_model_file, tmp_path / "folder"), tmp_path / "other"
    before = os.umask(0o027)
    try:
        other.touch()
        file = convert(folder, tmp_path / "file.safetensors")
        again = convert(file, tmp_path / "again")
    finally:
        os.umask(before)
    for path in [file, *again.rglob("*.safetensors")]:
        assert stat.filemode(path.stat().st_mode) == stat.filemode(other.stat().st_mode) == "-rw-r-----", path


@pytest.mark.parametrize("style", ["sd1", "sd2"])
def test_round_trips_of_both_families(style: str, tmp_path: Path) -> None:
    folder = single_files.save_folder(tmp_path / "folder", style)
    file = convert(folder, tmp_path / "file.safetensors")
    assert_same_model(convert(file, tmp_path / "back"), folder)
    header, _ = split(file.read_bytes())
    stored = json.loads(header["__metadata__"]["fastsd"])["tokenizer"]
    assert set(stored) == {"tokenizer_config.json", "special_tokens_map.json"}, "CLIP's own vocabulary is not stored"

    bare = tmp_path / "bare.safetensors"  # as anybody else writes it: the configs must come from the shapes
    safetensors.torch.save_file(safetensors.torch.load_file(file), bare)
    back = convert(bare, tmp_path / "of-bare")
    for component, state in single_files.folder_state(folder).items():
        single_files.assert_same_tensors(single_files.folder_state(back)[component], state, component)
    again = safetensors.torch.load_file(convert(back, tmp_path / "again.safetensors"))
    single_files.assert_same_tensors(again, safetensors.torch.load_file(bare), "file → folder → file")

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(back, local_files_only=True, dtype="auto")
    for component in COMPONENTS:
        found = {name.removeprefix("text_model."): x for name, x in getattr(pipe, component).state_dict().items()}
        found = {name: x.half() for name, x in found.items() if not name.endswith("position_ids")}
        single_files.assert_same_tensors(found, single_files.folder_state(folder)[component], f"diffusers' {component}")
    predicted = "epsilon" if style == "sd1" else "v_prediction"
    assert pipe.scheduler.config.prediction_type == predicted
    assert pipe.tokenizer.pad_token == ("<|endoftext|>" if style == "sd1" else "!")
    assert pipe.unet.config.sample_size * 8 == (512 if style == "sd1" else 768)


def test_diffusers_opens_the_file(tmp_path: Path) -> None:
    folder = single_files.save_folder(tmp_path / "folder", "sd1")
    file = convert(folder, tmp_path / "file.safetensors")
    unet = diffusers.UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", local_files_only=True, torch_dtype=torch.float16
    )
    expected = single_files.folder_state(folder)["unet"]
    single_files.assert_same_tensors(dict(unet.state_dict()), expected, "diffusers' from_single_file")


def test_dtypes_stay_what_they_are(folder: Path, tmp_path: Path) -> None:
    state = {name: x.to(torch.bfloat16) for name, x in safetensors.torch.load_file(folder / UNET).items()}
    state["conv_out.bias"] = state["conv_out.bias"].double()
    safetensors.torch.save_file(state, folder / UNET)
    back = convert(convert(folder, tmp_path / "x.safetensors"), tmp_path / "back")
    single_files.assert_same_tensors(single_files.folder_state(back)["unet"], state, "unet")


def test_older_names_and_shapes_in_the_folder(folder: Path, small_model_file: Path, tmp_path: Path) -> None:
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor
    safetensors.torch.save_file(state, path)
    assert convert(folder, tmp_path / "x.safetensors").read_bytes() == small_model_file.read_bytes()


def test_averaged_weights_go_into_the_folder(file: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(file)
    averaged = {
        "model_ema." + name[len("model.") :].replace(".", ""): tensor * 2
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }
    header, _ = split(file.read_bytes())
    safetensors.torch.save_file(state | averaged, file, header["__metadata__"])
    back = convert(file, tmp_path / "ema", use_ema=True)
    doubled = {name: tensor * 2 for name, tensor in single_files.folder_state(SMALL_MODEL)["unet"].items()}
    single_files.assert_same_tensors(single_files.folder_state(back)["unet"], doubled, "unet")


def test_a_pickle_on_demand(file: Path, tmp_path: Path) -> None:
    single_files.save_folder(tmp_path / "folder", "sd1")
    state = single_files.ldm_state(tmp_path / "folder", tmp_path)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        convert(tmp_path / "model.ckpt", tmp_path / "out")
    back = convert(tmp_path / "model.ckpt", tmp_path / "out", allow_pickle=True)
    expected = single_files.folder_state(tmp_path / "folder")
    for component, found in single_files.folder_state(back).items():
        single_files.assert_same_tensors(found, expected[component], component)


def test_prediction_type_is_kept(small_model_file: Path, tmp_path: Path) -> None:
    folder = convert(small_model_file, tmp_path / "v", prediction_type="v_prediction")
    file = convert(folder, tmp_path / "v.safetensors")
    assert open_single_file(file).scheduler["prediction_type"] == "v_prediction"


# What is refused, and what it leaves


def names(path: Path) -> set[str]:
    return {str(item.relative_to(path)) for item in path.rglob("*")}


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("model", "out", "a folder becomes a single file: the name must end in .safetensors"),
        ("model", "out.ckpt", "a folder becomes a single file"),
        ("model.safetensors", "out.safetensors", "a single file becomes a folder"),
        ("model", "nowhere/out.safetensors", "the folder .*nowhere' does not exist; make it first"),
        ("model", "taken.safetensors", r"exists; pass force=True \(--force\) to replace it"),
        ("model.safetensors", "taken", "exists; pass force=True"),
        ("model.safetensors", "model.safetensors", "is, or holds, the source"),
        ("model", ".", "is, or holds, the source"),
    ],
)
def test_targets_that_are_refused(
    source: str, target: str, reason: str, file: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken.safetensors").write_text("precious")
    shutil.copytree(folder, tmp_path / "taken")
    before = names(tmp_path)
    with pytest.raises(ParameterError, match=f"target: .*{reason}"):
        convert(tmp_path / source, tmp_path / target)
    assert names(tmp_path) == before
    assert (tmp_path / "taken.safetensors").read_text() == "precious"


def test_force_replaces_what_it_could_have_written(file: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken.safetensors").write_text("old")
    assert convert(folder, tmp_path / "taken.safetensors", force=True).read_bytes() == file.read_bytes()
    taken = Path(shutil.copytree(folder, tmp_path / "taken"))
    (taken / "old").write_text("of the folder that is replaced")
    convert(file, taken, force=True)
    assert_same_model(taken, SMALL_MODEL)
    assert not (taken / "old").exists()
    assert not [name for name in names(tmp_path) if ".fastsd" in name], "temporary names were left behind"


@pytest.mark.parametrize("kind", ["another folder", "a file", "a link"])
def test_force_replaces_nothing_else(kind: str, file: Path, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "home"
    if kind == "another folder":
        target.mkdir()
        (target / "thesis.txt").write_text("precious")
    elif kind == "a file":
        target.write_text("precious")
    else:
        target.symlink_to(folder)
    before = names(tmp_path)
    with pytest.raises(ParameterError, match="is no diffusers folder, and is not replaced"):
        convert(file, target, force=True)
    assert names(tmp_path) == before


@pytest.mark.parametrize("to_file", [True, False])
def test_a_damaged_source_leaves_the_target(to_file: bool, file: Path, folder: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(folder / UNET)
    safetensors.torch.save_file({name: x for name, x in state.items() if name != "conv_out.bias"}, folder / UNET)
    state = safetensors.torch.load_file(file)
    metadata = split(file.read_bytes())[0]["__metadata__"]
    safetensors.torch.save_file(
        {name: x for name, x in state.items() if not name.endswith("out.2.bias")}, file, metadata
    )
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing \(conv_out\.bias\)"):
        convert(folder if to_file else file, tmp_path / ("out.safetensors" if to_file else "out"))
    assert names(tmp_path) == before


def test_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
        convert(folder, tmp_path / "out.safetensors")


FULL_DISK = """
import resource, signal, sys
from fastsd.convert import convert
from fastsd.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
for source, target in ((sys.argv[1], sys.argv[3] + "/out.safetensors"), (sys.argv[2], sys.argv[3] + "/out")):
    for force in (False, True):
        try:
            convert(source, target if not force else target.replace("out", "old"), force=force)
        except CheckpointError as error:
            print(error)
"""


def test_a_full_disk_leaves_nothing(file: Path, folder: Path, tmp_path: Path) -> None:
    """No file of the process may grow beyond 2 MB: the UNet's has 8."""
    room = tmp_path / "room"
    room.mkdir()
    (room / "old.safetensors").write_text("precious")
    shutil.copytree(folder, room / "old")
    before = names(room)
    arguments = [sys.executable, "-c", FULL_DISK, str(folder), str(file), str(room)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout
    assert all("cannot be written: " in line for line in lines), done.stdout
    assert names(room) == before
    assert (room / "old.safetensors").read_text() == "precious"
    assert_same_model(room / "old", SMALL_MODEL)


@pytest.mark.parametrize("moment", ["while writing", "between the renames"])
def test_an_interrupt_leaves_everything_as_it_was(
    moment: str, file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    if moment == "while writing":
        monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    else:
        monkeypatch.setattr(Path, "replace", interrupt)
    before = names(tmp_path)
    for target, force in ((tmp_path / "out", False), (folder, True)):
        with pytest.raises(KeyboardInterrupt):
            convert(file, target, force=force)
    assert names(tmp_path) == before
    assert_same_model(folder, SMALL_MODEL)


# The command line


def test_command(small_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object, code: int) -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            cli.app([str(argument) for argument in arguments], prog_name="fastsd")
        assert left.value.code == code, f"{arguments}: exit code {left.value.code}"
        return capsys.readouterr()

    target, drawn = tmp_path / "x.safetensors", tmp_path / "out.png"
    assert run("convert", SMALL_MODEL, target, code=0) == (f"{target}\n", "")
    assert target.read_bytes() == small_model_file.read_bytes()
    refused = f"fastsd: error: target: {str(target)!r} exists; pass force=True (--force) to replace it\n"
    assert run("convert", SMALL_MODEL, target, code=2) == ("", refused)
    options = ("--steps", 1, "-s", 0, "-q", "--device", "cpu", "--backend", "reference")
    run("generate", "-m", target, "-p", "a red circle", *options, "-o", drawn, code=0)
    assert "Model: x," in drawn.read_bytes().decode("latin-1"), "the model's name is the file's"
