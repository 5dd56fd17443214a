"""LoRA and embedding files that are damaged, unsafe, or for another model: one line that says so, and nothing changed."""

import base64
import hashlib
import json
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

import fastsd
from fastsd.adapters import LoraAdapters, SwapLock
from fastsd.adapters.lora_layers import read_lora
from fastsd.checkpoints.lora import read_embedding
from fastsd.errors import CheckpointError
from tests.adapter_builders import LINEAR, kohya_lora, nets, save, save_small_model, weights
from tests.checkpoints.checkpoint_builders import join

State = dict[str, Tensor]

TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"  # 64 × 64
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"  # 32 → 32, 3 × 3


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> fastsd.Pipeline:
    return fastsd.Pipeline(save_small_model(tmp_path_factory.mktemp("sd1"), "sd1"), device="cpu", backend="reference")


@pytest.fixture(scope="module")
def good(pipe: fastsd.Pipeline) -> State:
    return kohya_lora(pipe, LINEAR, rank=2)


def assert_refused(pipe: fastsd.Pipeline, path: Path, reason: str, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_lora(path, nets(pipe), **options)
    message = str(caught.value)
    assert "\n" not in message, f"more than a line: {message}"
    assert message.isprintable(), f"control characters: {message!r}"
    assert len(message) < 3000, f"{len(message)} characters long"
    return message


def without(*endings: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if not key.endswith(endings)}


def adding(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def setting(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: state | {f"{TO_Q}.{key}": value(state[f"{TO_Q}.{key}"])}


def nan(tensor: Tensor) -> Tensor:
    return tensor.clone().flatten().index_fill_(0, torch.tensor([3]), float("nan")).reshape(tensor.shape)


def only(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: {name.replace("__", "."): tensor for name, tensor in tensors.items()}


ones = torch.ones
FAULTS: dict[str, tuple[Callable[[State], State], str]] = {
    "NaN": (setting("lora_down.weight", nan), rf"NaN or infinite values in 1 tensors \({TO_Q}.lora_down.weight\)"),
    "infinite alpha": (setting("alpha", lambda _: torch.tensor(float("inf"))), "NaN or infinite values"),
    "no up": (without("to_q.lora_up.weight"), "incomplete, or of no kind that is known"),
    "alpha alone": (only(**{f"{TO_Q}__alpha": ones(())}), "incomplete"),
    "other rank": (
        setting("lora_down.weight", lambda t: t[:1]),
        r"1 layers of another shape .*down \[1, 64\], up \[64, 2\]",
    ),
    "other width": (setting("lora_down.weight", lambda t: t[:, :48]), r"unet.mid_block.*\[64, 64\]"),
    "other height": (setting("lora_up.weight", lambda t: t[:8]), "1 layers of another shape"),
    "no rank": (
        only(**{f"{TO_Q}__lora_up__weight": ones(64, 0), f"{TO_Q}__lora_down__weight": ones(0, 64)}),
        "of rank 1 at least",
    ),
    "a vector": (setting("lora_up.weight", lambda t: t[:, 0]), r"\[64\] of float32; a factor is a matrix"),
    "integers": (setting("lora_up.weight", lambda t: t.to(torch.int8)), "int8; a factor is a matrix of floats"),
    **{
        f"alpha of {alpha:g}": (
            setting("alpha", lambda _, alpha=alpha: torch.tensor(alpha, dtype=torch.float64)),
            r"alpha scales unet\.mid_block\..*\.to_q by .*, more than can be merged \(3\.4e\+35\)",
        )
        for alpha in (1e300, -1e300, 7e35)
    },
    "alpha of a layer's size": (setting("alpha", lambda _: ones(64)), "must be one number"),
    "unknown layer": (
        adding(lora_unet_down_blocks_9_conv1__alpha=ones(())),
        "has no layers for 1 .*down_blocks_9_conv1",
    ),
    "unknown factor": (
        adding(**{f"{TO_Q}__diff": ones(64, 64)}),
        rf"1 keys are of no LoRA, LoHa or LoKr \({TO_Q}.diff\)",
    ),
    "bias of PEFT": (adding(**{"unet__conv_in__lora_B__bias": ones(4)}), "are of no LoRA"),
    "no LoRA at all": (only(model__weight=ones(2, 2)), "are of no LoRA"),
    "nothing": (only(), "holds no tensors"),
    "twice": (
        adding(**{"unet__mid_block__attentions__0__transformer_blocks__0__attn1__to_q__lora_A__weight": ones(2, 64)}),
        "duplicate",
    ),
    "two kinds in a layer": (adding(**{f"{TO_Q}__hada_w1_a": ones(64, 2)}), "of no kind that is known"),
    "DoRA of kohya": (adding(**{f"{TO_Q}__dora_scale": ones(64, 1)}), "a DoRA .*fastsd merges LoRA, LoHa and LoKr"),
    "DoRA of PEFT": (
        adding(unet__mid_block__attentions__0__proj_in__lora_magnitude_vector__weight=ones(64)),
        "a DoRA",
    ),
    "LoHa that does not fit": (
        only(
            **{
                f"{TO_Q}__hada_w{i}_{side}": ones(*shape)
                for i, side, shape in ((1, "a", (64, 2)), (1, "b", (2, 64)), (2, "a", (64, 2)), (2, "b", (3, 64)))
            }
        ),
        "1 layers of another shape",
    ),
    "LoHa with one core": (
        only(
            **{f"{CONV}__hada_w{i}_{side}": ones(2, 32) for i in (1, 2) for side in "ab"},
            **{f"{CONV}__hada_t1": ones(2, 2, 3, 3)},
        ),
        "of no kind that is known",
    ),
    "LoKr of another size": (
        only(**{f"{TO_Q}__lokr_w1": ones(4, 4), f"{TO_Q}__lokr_w2": ones(16, 15)}),
        "1 layers of another shape",
    ),
    "LoKr with a core of another kernel": (
        only(
            **{
                f"{CONV}__lokr_w1": ones(4, 4),
                f"{CONV}__lokr_w2_a": ones(2, 8),
                f"{CONV}__lokr_w2_b": ones(2, 8),
                f"{CONV}__lokr_t2": ones(2, 2, 5, 5),
            }
        ),
        "1 layers of another shape",
    ),
    "SD 2.x": (
        only(
            **{
                f"{TO_Q}__lora_up__weight".replace("attn1_to_q", "attn2_to_k"): ones(64, 2),
                f"{TO_Q}__lora_down__weight".replace("attn1_to_q", "attn2_to_k"): ones(2, 1024),
            }
        ),
        "it was trained for Stable Diffusion 2.x",
    ),
    "SDXL": (adding(lora_te2_text_model_encoder_layers_0_mlp_fc1__alpha=ones(())), "a LoRA for Stable Diffusion XL"),
    "SDXL's UNet": (
        adding(lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q__alpha=ones(())),
        "for Stable Diffusion XL",
    ),
    "FLUX": (only(lora_unet_double_blocks_0_img_attn_proj__lora_up__weight=ones(2, 2)), "a LoRA for FLUX"),
    "FLUX of diffusers": (
        only(transformer__single_transformer_blocks__0__proj_out__lora_A__weight=ones(2, 2)),
        "for FLUX",
    ),
    "SD 3": (only(lora_unet_joint_blocks_0_x_block_mlp_fc1__lora_up__weight=ones(2, 2)), "for Stable Diffusion 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_a_line(pipe: fastsd.Pipeline, good: State, tmp_path: Path, fault: str) -> None:
    damage, reason = FAULTS[fault]
    path = save(damage(good), tmp_path / "some.safetensors")
    message = assert_refused(pipe, path, reason)
    assert message.startswith("some.safetensors: "), f"the message does not name the file: {message}"


def test_the_undamaged_file_is_read(pipe: fastsd.Pipeline, good: State, tmp_path: Path) -> None:
    """Else the faults above might be refused for something else."""
    found = read_lora(save(good, tmp_path / "good.safetensors"), nets(pipe)).layers
    assert len(found) == len(good) // 3
    assert {component for component, _ in found} == {"unet", "text_encoder"}


def test_names_are_cut(pipe: fastsd.Pipeline, tmp_path: Path) -> None:
    """Many keys, long ones, and ones that would move the terminal's cursor."""
    state = {f"lora_unet_nothing_{i}.lora_up.weight": torch.ones(1, 1) for i in range(50)}
    message = assert_refused(pipe, save(state, tmp_path / "many.safetensors"), "no layers for 50 of the keys")
    assert message.count("lora_unet_nothing") == 10
    assert "and 40 more" in message
    hostile = {"lora_unet_\x1b[2J\n" + "x" * 10_000 + ".lora_up.weight": torch.ones(1, 1)}
    assert_refused(pipe, save(hostile, tmp_path / "hostile.safetensors"), "1 keys are of no LoRA")


def test_shapes_are_checked_before_anything_is_read(pipe: fastsd.Pipeline, good: State, tmp_path: Path) -> None:
    """A header alone, for tensors of 3 GB each that are not there, is refused for what it says."""
    names = [f"{TO_Q}.lora_{part}.weight" for part in ("up", "down")]
    size = 4 * 64 * 12_000_000
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [index * size, (index + 1) * size]}
        for index, (name, shape) in enumerate(zip(names, ([64, 12_000_000], [12_000_000, 64]), strict=True))
    }
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(join(header))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2 * size)  # a hole: takes no disk
    assert_refused(pipe, path, "more than 4,294,967,296 are no adapter")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>log in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x00" * 100, "not a safetensors file"),
    ],
)
def test_what_is_no_safetensors(pipe: fastsd.Pipeline, tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    assert_refused(pipe, path, reason)


def test_truncated(pipe: fastsd.Pipeline, good: State, tmp_path: Path) -> None:
    path = save(good, tmp_path / "lora.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(pipe, path, "truncated")


class Attack:
    def __reduce__(self) -> Any:
        return print, ("code of the file's was run",)


def test_pickles_only_if_allowed(pipe: fastsd.Pipeline, good: State, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "lora.safetensors"  # its content tells, not its name
    torch.save(good, path)
    assert_refused(pipe, path, "is a pickle, which can carry code.*allow_pickle=True")
    found = read_lora(path, nets(pipe), allow_pickle=True).layers
    safe = read_lora(save(good, tmp_path / "same.safetensors"), nets(pipe)).layers
    for layer, delta in safe.items():
        assert torch.equal(delta.value(), found[layer].value()), f"{layer} differs"
    torch.save(good | {"x": Attack()}, path)
    assert_refused(pipe, path, "refused", allow_pickle=True)
    huge = {
        f"{TO_Q}.lora_up.weight": torch.ones(1).expand(64, 10**9),
        f"{TO_Q}.lora_down.weight": torch.ones(1).expand(10**9, 64),
    }
    torch.save(huge, path)
    assert_refused(pipe, path, "are no adapter", allow_pickle=True)
    torch.save(good | {"x": torch.eye(3).to_sparse()}, path)
    assert_refused(pipe, path, "not a dense tensor", allow_pickle=True)
    assert "was run" not in capsys.readouterr().out


def test_which_file_of_a_folder(pipe: fastsd.Pipeline, good: State, tmp_path: Path) -> None:
    assert_refused(pipe, tmp_path / "nothing", "no such file or folder")
    assert_refused(pipe, tmp_path, "say which file with weight_name; files there: none")
    mine = save(good, tmp_path / "mine.safetensors")
    assert len(read_lora(tmp_path, nets(pipe)).layers) == len(good) // 3
    save({key: tensor for key, tensor in good.items() if TO_Q in key}, tmp_path / "one.safetensors")
    assert_refused(pipe, tmp_path, "say which file with weight_name; files there: mine.safetensors, one.safetensors")
    assert len(read_lora(tmp_path, nets(pipe), "one.safetensors").layers) == 1
    assert_refused(pipe, tmp_path, "holds no three.safetensors", weight_name="three.safetensors")
    assert_refused(pipe, tmp_path, "no plain file name", weight_name="../mine.safetensors")
    assert_refused(pipe, mine, "leave weight_name out", weight_name="mine.safetensors")
    mine.rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(read_lora(tmp_path, nets(pipe)).layers) == len(good) // 3, "diffusers' own name comes first"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("{", "not valid JSON"),
        (json.dumps({"unet.lora_alpha": "8"}), "no number"),
        ('{"unet.lora_alpha": NaN}', "JSON"),
        ('{"unet.lora_alpha": 1e300}', r"alpha scales unet\.mid_block\..*\.to_q by 1e\+300"),
        ('{"unet.lora_alpha": 1%s}' % ("0" * 400), "by inf, more than can be merged"),
        ('{"unet.alpha_pattern": {"to_q": -1%s}}' % ("0" * 400), "by inf, more than can be merged"),
    ],
)
def test_settings_in_the_header(pipe: fastsd.Pipeline, tmp_path: Path, settings: str, reason: str) -> None:
    state = {f"{TO_Q}.lora_up.weight": torch.ones(64, 1), f"{TO_Q}.lora_down.weight": torch.ones(1, 64)}
    path = save(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": settings})
    assert_refused(pipe, path, reason)


VECTORS = torch.linspace(-1, 1, 3 * 48).reshape(3, 48)
A1111 = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": VECTORS},
    "name": "cat",
    "step": 10,
    "sd_checkpoint": None,
}


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (A1111, "cat"),
        (A1111 | {"name": None}, "some"),
        ({"<cat>": VECTORS}, "<cat>"),
        (OrderedDict({"<cat>": torch.nn.Parameter(VECTORS)}), "<cat>"),
        ({"emb_params": VECTORS.half()}, "some"),
        ({"<cat>": VECTORS[0]}, "<cat>"),
    ],
)
@pytest.mark.parametrize("kind", ["pickle", "old pickle", "safetensors"])
def test_embeddings_of_both_kinds(tmp_path: Path, state: Any, word: str, kind: str) -> None:
    path = tmp_path / "some.pt"
    vectors = next((value for value in state.values() if isinstance(value, Tensor)), VECTORS)
    if kind == "safetensors":
        if "string_to_param" in state:
            state, word = {"emb_params": VECTORS}, "some"
        save({key: value.detach() for key, value in state.items()}, path)
        label, found, read, digest = read_embedding(path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pickle")
        with pytest.raises(CheckpointError, match="is a pickle"):
            read_embedding(path)
        label, found, read, digest = read_embedding(path, allow_pickle=True)
    assert (label, found, digest) == ("some.pt", word, hashlib.sha256(path.read_bytes()).hexdigest())
    assert torch.equal(read, vectors.detach().reshape(-1, 48)), "other vectors"


EMBEDDING_FAULTS: dict[str, tuple[Any, str]] = {
    "SDXL": ({"clip_l": VECTORS, "clip_g": VECTORS}, "for Stable Diffusion XL"),
    "two words": ({"<a>": VECTORS, "<b>": VECTORS}, "must hold one embedding, but holds <a>, <b>"),
    "no words": ({}, "must hold one embedding, but holds none"),
    "NaN": ({"<a>": nan(VECTORS)}, "NaN or infinite"),
    "integers": ({"<a>": VECTORS.long()}, r"vectors \[n, C\] of floats, not \[3, 48\] of int64"),
    "a cube": ({"<a>": VECTORS[None]}, r"not \[1, 3, 48\]"),
    "empty": ({"<a>": VECTORS[:0]}, r"not \[0, 48\]"),
}
PICKLED_FAULTS: dict[str, tuple[Any, str]] = {
    "a list": ([VECTORS], "holds no embedding"),
    "numbers for words": ({1: VECTORS}, "holds no embedding"),
    "no tensor": ({"<a>": [1.0, 2.0]}, "no dense tensor, but a list"),
    "sparse": ({"<a>": VECTORS.to_sparse()}, "no dense tensor"),
    "endless": ({"<a>": torch.ones(1).expand(10**9, 48)}, r"not \[1000000000, 48\]"),
    "two in A1111's": ({"string_to_param": {"*": VECTORS, "+": VECTORS}}, "must hold one embedding"),
    "nothing in A1111's": ({"string_to_param": None, "name": "x"}, "must hold one embedding, but holds none"),
    "code": ({"<a>": Attack()}, "refused"),
}


@pytest.mark.parametrize("fault", [*EMBEDDING_FAULTS, *PICKLED_FAULTS])
def test_embedding_faults(tmp_path: Path, fault: str) -> None:
    state, reason = (EMBEDDING_FAULTS | PICKLED_FAULTS)[fault]
    torch.save(state, tmp_path / "some.pt")
    paths = [tmp_path / "some.pt"]
    if fault in EMBEDDING_FAULTS:
        paths.append(save(state, tmp_path / "some.safetensors"))
    for path in paths:
        with pytest.raises(CheckpointError, match=reason) as caught:
            read_embedding(path, allow_pickle=True)
        assert str(caught.value).startswith(f"{path.name}: "), str(caught.value)
        assert "\n" not in str(caught.value)


class OldParameterDict(torch.nn.ParameterDict):
    """As torch before 1.12 kept its parameters: as a module does."""

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "_keys" and not isinstance(value, Tensor)}
        return state | {"_parameters": OrderedDict((key, self[key]) for key in self.keys())}


@pytest.mark.parametrize("old", [False, True])
def test_embeddings_in_a_parameter_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """What A1111 trains: torch's own class, which is not made, nor is any of its code run."""
    held: Any = (OldParameterDict if old else torch.nn.ParameterDict)({"*": torch.nn.Parameter(VECTORS)})
    OldParameterDict.__module__, OldParameterDict.__qualname__ = "torch.nn.modules.container", "ParameterDict"
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.modules.container.ParameterDict", type(held))  # as pickle looks it up
        torch.save(A1111 | {"string_to_param": held}, tmp_path / "cat.pt")
    with pytest.raises(CheckpointError, match="is a pickle"):
        read_embedding(tmp_path / "cat.pt")
    _, word, read, _ = read_embedding(tmp_path / "cat.pt", allow_pickle=True)
    assert word == "cat"
    assert torch.equal(read, VECTORS)
    assert type(read) is Tensor
    torch.save(A1111 | {"string_to_param": torch.nn.ParameterDict()}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="must hold one embedding, but holds none"):
        read_embedding(tmp_path / "none.pt", allow_pickle=True)
    torch.save(A1111 | {"string_to_param": torch.nn.ModuleDict()}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.container\.ModuleDict"):
        read_embedding(tmp_path / "other.pt", allow_pickle=True)


def embedding_image(path: Path, text: str | None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def as_web_ui(state: dict[str, Any]) -> str:
    rows = {key: {"TORCHTENSOR": tensor.tolist()} for key, tensor in state["string_to_param"].items()}
    return base64.b64encode(json.dumps(state | {"string_to_param": rows}).encode()).decode()


def test_a_picture_is_not_decoded_for_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = embedding_image(tmp_path / "a.png", as_web_ui(A1111)), embedding_image(tmp_path / "b.png", None)
    content = bytearray(large.read_bytes())
    content[16:24] = struct.pack(">II", 13000, 13000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    large.write_bytes(content)
    monkeypatch.setattr(PngImageFile, "load", lambda *_: pytest.fail("the picture is decoded"))
    assert torch.equal(read_embedding(small).vectors, VECTORS)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(CheckpointError, match="13000x13000 pixels"):
        read_embedding(large)


def test_an_embedding_in_a_picture(tmp_path: Path) -> None:
    label, word, read, digest = read_embedding(embedding_image(tmp_path / "some.PNG", as_web_ui(A1111)))
    assert (label, word) == ("some.PNG", "cat")
    assert torch.equal(read, VECTORS)
    assert digest == hashlib.sha256((tmp_path / "some.PNG").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "a picture that holds no embedding"),
        ("!!!", "is no base64"),
        (base64.b64encode(b"{").decode(), "not valid JSON"),
        (base64.b64encode(b"[1]").decode(), "not an object"),
        (base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1, 2], [3]]}}}').decode(), "rows of numbers"),
        (base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [["a"]]}}}').decode(), "rows of numbers"),
        (base64.b64encode(b'{"string_to_param": {"*": 3}}').decode(), "rows of numbers"),
        (base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [[[1]]]}}}').decode(), r"vectors \[n, C\]"),
        (
            base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1e300]]}}}').decode(),
            "NaN or infinite|numbers",
        ),
    ],
)
def test_pictures_that_hold_no_embedding(tmp_path: Path, text: str | None, reason: str) -> None:
    path = embedding_image(tmp_path / "some.png", text)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_embedding(path)
    assert str(caught.value).startswith("some.png: ")
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="cannot be read as a PNG"):
        read_embedding(path)


def test_the_hash_is_of_what_was_read(pipe: fastsd.Pipeline, good: State, tmp_path: Path) -> None:
    """As the web UI takes it: of all behind a safetensors header, so that a changed header is the same LoRA."""
    files = [save(good, tmp_path / "a.safetensors"), save(good, tmp_path / "b.safetensors", {"ss_tag": "x" * 99})]
    contents = [path.read_bytes() for path in files]
    behind = {content[8 + int.from_bytes(content[:8], "little") :] for content in contents}
    assert len(behind) == 1
    hashes = {read_lora(path, nets(pipe)).sha256 for path in files}
    assert hashes == {hashlib.sha256(behind.pop()).hexdigest()}
    torch.save(good, tmp_path / "c.pt")
    found = read_lora(tmp_path / "c.pt", nets(pipe), allow_pickle=True)
    assert (found.name, found.sha256) == ("c", hashlib.sha256((tmp_path / "c.pt").read_bytes()).hexdigest())


def test_a_large_embedding_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    with path.open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(CheckpointError, match="are no adapter"):
        read_embedding(path)


def test_refused_files_change_nothing(pipe: fastsd.Pipeline, good: State, tmp_path: Path) -> None:
    before = weights(pipe)
    loras = LoraAdapters(nets(pipe), SwapLock())
    for index, (damage, _) in enumerate(FAULTS.values()):
        with pytest.raises(CheckpointError):
            loras.load_lora_weights(save(damage(good), tmp_path / f"{index}.safetensors"))
    assert loras.get_list_adapters() == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(pipe).items())
