"""Damaged and hostile files: each is a CheckpointError that names the file and the reason, and the next load succeeds."""

import io
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastsd.checkpoints import open_folder
from fastsd.checkpoints.safetensors_file import MAX_HEADER_BYTES
from fastsd.errors import CheckpointError, FastSDError
from tests.checkpoints.checkpoint_builders import (
    UNET,
    edit_json,
    join,
    meta_net,
    net_state,
    small_model_state,
    split,
)
from tests.small_model import SMALL_MODEL

CPU = torch.device("cpu")
GOOD = safetensors.torch.save(net_state())
BIN = "unet/diffusion_pytorch_model.bin"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> dict[str, torch.Tensor]:
    net = meta_net()
    try:
        open_folder(folder, **options).load_weights("unet", net, dtype, CPU)
    except FastSDError:
        assert all(tensor.is_meta for tensor in net.state_dict().values()), "a failed load left tensors behind"
        raise
    return net.state_dict()


def assert_refused(folder: Path, named: str, reason: str, **options: object) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert named in message, f"the message does not name {named}: {message}"
    assert "\n" not in message, f"more than a line: {message}"
    assert message.isprintable(), f"control characters: {message!r}"


def outcome(folder: Path, **options: object) -> str | None:
    """None if the folder loads, with finite weights; else the message. Any other exception passes through."""
    try:
        loaded = load(folder, **options)
    except CheckpointError as error:
        return str(error)
    assert all(torch.isfinite(tensor).all() for tensor in loaded.values())
    return None


def assert_good_file_loads(folder: Path) -> None:
    (folder / UNET).write_bytes(GOOD)
    loaded = load(folder)
    for name, tensor in net_state().items():
        assert torch.equal(loaded[name], tensor), f"{name} differs after an earlier fault"


def edited(change: Callable[[dict], None]) -> bytes:
    """The good file with its header changed."""
    header, data = split(GOOD)
    change(header)
    return join(header, data)


def set_entry(name: str, **fields: object) -> bytes:
    return edited(lambda header: header[name].update(fields))


def with_values(**values: torch.Tensor) -> bytes:
    return safetensors.torch.save(net_state() | {name.replace("__", "."): value for name, value in values.items()})


def poisoned(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = net_state()["conv.weight"].to(dtype)
    weight[3, 1, 2, 0] = value
    return weight


def duplicate_key() -> bytes:
    header, data = split(GOOD)
    text = json.dumps(header)
    name = json.dumps("conv.bias")
    return join((text[:-1] + f", {name}: {json.dumps(header['conv.bias'])}}}").encode(), data)


def swapped_offsets(header: dict) -> None:
    header["conv.bias"]["data_offsets"] = header["norm.bias"]["data_offsets"]


header, data = split(GOOD)
end = len(data)
first = min((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
begin, stop = header[first]["data_offsets"]

SAFETENSORS_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "short": (b"\x10\0\0", "truncated"),
    "eight bytes": (GOOD[:8], "truncated"),
    "header length 0": (join(header, data, size=0), "header of 0 bytes"),
    "header length beyond file": (join(header, size=10**6), "header of 1,000,000 bytes in a file of"),
    "header length 2^63": (join(header, data, size=2**63), "header of 9,223,372,036,854,775,808 bytes"),
    "header of 17 MB": (join(b'{"__metadata__":{"a":"' + b"x" * 17 * 2**20 + b'"}}'), "more than 16 MB"),
    "20,001 tensors": (
        join({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}),
        "20,001 tensors",
    ),
    "a million empty lists": (join(b'{"a":[' + b"[]," * 10**6 + b"[]]}"), "more than 1,000,000 values"),
    "bad UTF-8": (join(b'{"\xff\xfe":1}'), "not valid JSON.*utf-8"),
    "bad JSON": (join(b"{nope}"), "not valid JSON"),
    "cut JSON": (join(json.dumps(header).encode()[:-9], data), "not valid JSON"),
    "an array": (join(b"[1, 2, 3]"), "no JSON object"),
    "deep nesting": (join(b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}"), "nested too deeply"),
    "NaN in the header": (join(b'{"a":NaN}'), "NaN is not a JSON number"),
    "a number without end": (join(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "duplicate keys": (duplicate_key(), "conv.bias.*duplicate"),
    "truncated data": (GOOD[:-3], "truncated"),
    "trailing bytes": (GOOD + b"\0" * 4, "followed by bytes that belong to no tensor"),
    "hole": (edited(lambda h: h[first].update(data_offsets=[begin + 4, stop])), "damaged safetensors file"),
    "overlap": (edited(swapped_offsets), "damaged safetensors file.*offset"),
    "reversed offsets": (set_entry(first, data_offsets=[stop, begin]), "data_offsets"),
    "negative offsets": (set_entry(first, data_offsets=[-stop, begin]), "data_offsets"),
    "three offsets": (set_entry(first, data_offsets=[begin, stop, stop]), "data_offsets"),
    "offsets of text": (set_entry(first, data_offsets="0, 4"), "data_offsets"),
    "offset 2^62": (set_entry(first, data_offsets=[begin, 2**62]), "truncated.*4,611,686,018,427,38"),
    "offset 2^65": (set_entry(first, data_offsets=[begin, 2**65]), "data_offsets"),
    "bytes of another dtype": (set_entry("conv.bias", dtype="F16"), "damaged safetensors file"),
    "shape that overflows": (
        set_entry("conv.bias", shape=[2**62, 8]),
        "conv.bias expected .5., found .4611686018427387904, 8",
    ),
    "negative shape": (set_entry("conv.bias", shape=[-5]), "shape .-5. is no list of sizes"),
    "shape of floats": (set_entry("conv.bias", shape=[5.0]), "shape .5.0. is no list of sizes"),
    "shape of booleans": (set_entry("conv.bias", shape=[True]), "is no list of sizes"),
    "unknown dtype": (set_entry("conv.bias", dtype="Q4_K"), "dtype 'Q4_K' is not supported"),
    "float8": (set_entry("conv.bias", dtype="F8_E4M3"), "dtype 'F8_E4M3' is not supported"),
    "dtype of no string": (set_entry("conv.bias", dtype=["F32"]), "is not supported"),
    "entry of no object": (edited(lambda h: h.update({"conv.bias": 3})), "header entry is no object"),
    "metadata of no strings": (edited(lambda h: h.update(__metadata__={"a": 1})), "damaged safetensors file"),
    "metadata of no object": (edited(lambda h: h.update(__metadata__=[1])), "damaged safetensors file"),
    "integer weights": (with_values(conv__bias=torch.ones(5, dtype=torch.int8)), "conv.bias is int8.*quantised"),
    "a NaN": (with_values(conv__weight=poisoned(float("nan"))), "conv.weight holds NaN or infinite"),
    "an infinity": (with_values(conv__weight=poisoned(float("-inf"))), "conv.weight holds NaN or infinite"),
    "a NaN in half": (with_values(conv__weight=poisoned(float("nan"), torch.float16)), "conv.weight holds NaN"),
    "a NaN in bfloat16": (with_values(conv__weight=poisoned(float("nan"), torch.bfloat16)), "conv.weight holds NaN"),
    "another shape": (with_values(linear__weight=torch.ones(4, 6)), r"linear.weight expected .6, 4., found .4, 6."),
    "a pickle by zip": (b"PK\x03\x04" + b"\0" * 60, "a zip archive .a pickle"),
    "a pickle, protocol 4": (pickle.dumps({"a": 1}, protocol=4), "a pickle, not safetensors"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><body>Not found, sorry</body></html>", "a web page"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 60, "a GGUF file"),
    "text": (b"hello world, these are not weights at all", "not a safetensors file"),
    "names with escapes": (
        edited(lambda h: h.update({"\x1b[31m\nred": h.pop("conv.bias")})),
        r"1 unexpected .*x1b.31m",
    ),
    "a name of a megabyte": (edited(lambda h: h.update({"x" * 2**20: h.pop("conv.bias")})), r"1 unexpected .xxx"),
    "a name that is no Unicode": (
        join(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "1 unexpected",
    ),
}


@pytest.mark.parametrize("fault", SAFETENSORS_FAULTS)
def test_safetensors_fault(model: Path, fault: str) -> None:
    content, reason = SAFETENSORS_FAULTS[fault]
    (model / UNET).write_bytes(content)
    assert_refused(model, UNET, f"(?s){reason}")
    assert_good_file_loads(model)


def test_header_at_the_cap_is_read(model: Path) -> None:
    """The cap is a cap, not a habit of refusing: metadata of 15 MB (a preview image) passes."""
    header, data = split(GOOD)
    content = join({"__metadata__": {"preview": "x" * 15 * 2**20}, **header}, data)
    assert int.from_bytes(content[:8], "little") < MAX_HEADER_BYTES
    (model / UNET).write_bytes(content)
    assert torch.equal(load(model)["conv.bias"], net_state()["conv.bias"])


@pytest.mark.parametrize("size", [1, 7, 31, 4096, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_one_bad_value_anywhere_is_found(model: Path, dtype: torch.dtype, size: int) -> None:
    """The scan goes by minimum and maximum: no lane or remainder of the vectorised reduction may hide a value."""
    from fastsd.checkpoints.weights import _convert

    places = {0, size - 1, size // 2, *random.Random(size).sample(range(size), min(size, 12))}
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in places:
            tensor = torch.zeros(size, dtype=dtype)
            tensor[place] = value
            with pytest.raises(CheckpointError, match="NaN or infinite"):
                _convert(tensor, torch.float32, CPU, f"{value} at {place} of {size}")


def test_overflow_in_half_is_found(model: Path) -> None:
    (model / UNET).write_bytes(with_values(conv__weight=poisoned(-65_536.0)))
    with pytest.raises(CheckpointError, match=r"conv.weight holds 65536, beyond the range of float16") as caught:
        load(model, torch.float16)
    assert UNET in str(caught.value)
    assert load(model, torch.bfloat16)["conv.weight"].min() == -65_536
    (model / UNET).write_bytes(with_values(conv__weight=poisoned(65_504.0)))  # float16's largest
    assert load(model, torch.float16)["conv.weight"].max() == 65_504


def test_long_lists_are_cut(model: Path) -> None:
    (model / UNET).write_bytes(safetensors.torch.save({f"odd.{i:03}": torch.zeros(1) for i in range(25)}))
    assert_refused(
        model, UNET, r"6 missing \(conv.bias, .*norm.weight\); 25 unexpected \(odd.000, .*odd.009 and 15 more\)"
    )


def test_nothing_is_read_before_names_and_shapes_fit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = safetensors.torch.load
    monkeypatch.setattr(safetensors.torch, "load", lambda content: read.append("read") or original(content))
    (model / UNET).write_bytes(with_values(extra=torch.ones(3)))
    assert_refused(model, UNET, r"1 unexpected \(extra\)")
    assert read == [], "the file was read although its header already told that it does not fit"
    assert_good_file_loads(model)
    assert read == ["read"], "the probe of this test does not see reads"


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_load_or_are_refused(model: Path, seed: int) -> None:
    """Flipped, cut and inserted bytes: a CheckpointError or weights of the right shape, and nothing else."""
    rng = random.Random(seed)
    refused = 0
    header_end = len(GOOD) - len(data)
    for _ in range(100):
        content = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(header_end if rng.random() < 0.8 else len(content))
            action = rng.randrange(3)
            if action == 0:
                content[place] = rng.randrange(256)
            elif action == 1:
                del content[place : place + rng.randint(1, 20)]
            else:
                content[place:place] = rng.randbytes(rng.randint(1, 20))
        (model / UNET).write_bytes(content)
        message = outcome(model)
        assert not message or UNET in message, message
        refused += message is not None
    assert refused > 50, "the mutations hardly damage anything"
    assert_good_file_loads(model)


# Pickles


def saved(state: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def rezipped(content: bytes, compression: int = zipfile.ZIP_STORED, edit: Callable[[bytes], bytes] = bytes) -> bytes:
    source, buffer = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for entry in source.infolist():
            body = source.read(entry)
            target.writestr(entry.filename, edit(body) if entry.filename.endswith("data.pkl") else body)
    return buffer.getvalue()


class Marker:
    """Unpickling this without restriction creates a file: the sign that code ran."""

    path = Path()

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


PICKLE = saved(net_state())
LEGACY = saved(net_state(), _use_new_zipfile_serialization=False)

PICKLE_FAULTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "text": (lambda: b"not weights at all", "unknown content"),
    "safetensors": (lambda: GOOD, "looks like safetensors"),
    "code": (lambda: saved(net_state() | {"conv.bias": Marker()}), "asks for posix.system"),
    "code, legacy": (lambda: saved({"a": Marker()}, _use_new_zipfile_serialization=False), "asks for posix.system"),
    "plain pickle": (lambda: pickle.dumps(Marker(), protocol=2), "not a file of torch.save"),
    "compressed entries": (lambda: rezipped(PICKLE, zipfile.ZIP_DEFLATED), "compressed zip entries"),
    "a small bomb": (
        lambda: rezipped(saved({"conv.bias": torch.zeros(2**24)}), zipfile.ZIP_DEFLATED),
        "compressed zip entries",
    ),
    "cut zip": (lambda: PICKLE[: len(PICKLE) // 2], "damaged zip"),
    "cut legacy": (lambda: LEGACY[:-100], "damaged or unsafe pickle"),
    "garbage after the magic number": (lambda: LEGACY[:15] + b"garbage" * 9, "damaged or unsafe pickle"),
    "garbage in the zip": (lambda: rezipped(PICKLE, edit=lambda body: b"\x80\x02garbage."), "damaged or unsafe pickle"),
    "an empty pickle in the zip": (lambda: rezipped(PICKLE, edit=lambda body: b""), "damaged or unsafe pickle"),
    "a memo that is not there": (
        lambda: rezipped(PICKLE, edit=lambda body: b"\x80\x02h\x05."),
        "damaged or unsafe pickle",
    ),
    "a storage larger than its record": (
        # 8 elements claimed as 100 million: an unchecked reader would look beyond the record
        lambda: rezipped(saved({"a": torch.arange(8.0)}), edit=lambda b: b.replace(b"K\x08", b"J\x00\xe1\xf5\x05")),
        "damaged or unsafe pickle",
    ),
    "a sparse tensor": (
        lambda: saved({"conv.bias": torch.eye(5).to_sparse()}),
        "conv.bias is not a dense tensor .sparse_coo",
    ),
    "a meta tensor": (
        lambda: saved({"conv.bias": torch.empty(5, device="meta")}),
        "conv.bias is not a dense tensor .*meta",
    ),
    "a number among tensors": (lambda: saved(net_state() | {"conv.bias": 3}), "conv.bias is a int, not a tensor"),
    "nested": (lambda: saved({"state_dict": net_state()}), "state_dict is a dict, not a tensor"),
    "a list": (lambda: saved([torch.zeros(3)]), "no mapping"),
    "keys of no string": (lambda: saved({1: torch.zeros(3)}), "key that is no string: 1"),
    "a view of 10^12 elements": (
        lambda: saved({"conv.bias": torch.zeros(1).expand(10**6, 10**6)}),
        "found .1000000, 1000000",
    ),
    "a NaN": (lambda: saved(net_state() | {"conv.weight": poisoned(float("nan"))}), "conv.weight holds NaN"),
    "integers": (lambda: saved(net_state() | {"conv.bias": torch.ones(5, dtype=torch.int8)}), "conv.bias is int8"),
}


@pytest.mark.parametrize("fault", PICKLE_FAULTS)
def test_pickle_fault(model: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Marker, "path", tmp_path / "code-ran")
    make, reason = PICKLE_FAULTS[fault]
    (model / UNET).unlink()
    (model / BIN).write_bytes(make())
    assert_refused(model, BIN, reason, allow_pickle=True)
    assert not Marker.path.exists(), "code in the pickle was run"
    (model / BIN).write_bytes(PICKLE)
    assert torch.equal(load(model, allow_pickle=True)["conv.bias"], net_state()["conv.bias"])


def test_the_marker_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Marker, "path", tmp_path / "code-ran")
    pickle.loads(pickle.dumps(Marker()))
    assert Marker.path.exists(), "the tests above could not see code run"


def test_overlapping_zip_entries(model: Path) -> None:
    """A directory that lists one stored entry many times would have each read in full."""
    source, buffer = zipfile.ZipFile(io.BytesIO(PICKLE)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        large = zipfile.ZipInfo("archive/data/99")
        target.writestr(large, bytes(10_000))
        for i in range(100, 120):
            copy = zipfile.ZipInfo(f"archive/data/{i}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copy, field, getattr(large, field))
            target.filelist.append(copy)
    (model / UNET).unlink()
    (model / BIN).write_bytes(buffer.getvalue())
    assert_refused(model, BIN, "hold more than the file's", allow_pickle=True)


@pytest.mark.parametrize("content", [PICKLE, LEGACY, saved(OrderedDict(net_state()))], ids=["zip", "legacy", "ordered"])
def test_pickle_needs_the_opt_in(model: Path, content: bytes) -> None:
    (model / UNET).unlink()
    (model / BIN).write_bytes(content)
    assert_refused(model, BIN, "pickle, which can carry code: convert it to safetensors, or pass allow_pickle=True")
    loaded = load(model, allow_pickle=True)
    for name, tensor in net_state().items():
        assert torch.equal(loaded[name], tensor), name


def test_safetensors_are_preferred_to_a_pickle(model: Path) -> None:
    (model / BIN).write_bytes(saved(net_state(1)))
    assert torch.equal(load(model, allow_pickle=True)["conv.bias"], net_state(0)["conv.bias"])


def test_pickled_tensors_that_share_memory_are_parted(model: Path) -> None:
    shared = torch.arange(12.0)
    state = net_state() | {"norm.weight": shared[:6], "norm.bias": shared[3:9]}
    (model / UNET).unlink()
    (model / BIN).write_bytes(saved(state))
    loaded = load(model, allow_pickle=True)
    loaded["norm.weight"].zero_()
    assert loaded["norm.bias"].tolist() == [3, 4, 5, 6, 7, 8], "a write to one weight reached another"


@pytest.mark.parametrize("content", [PICKLE, LEGACY, pickle.dumps(1, protocol=2)], ids=["zip", "legacy", "plain"])
def test_pickle_under_a_safetensors_name(model: Path, content: bytes) -> None:
    (model / UNET).write_bytes(content)
    assert_refused(model, UNET, "pickle", allow_pickle=True)
    assert_good_file_loads(model)


@pytest.mark.parametrize("seed", range(2))
def test_mutated_pickles_load_or_are_refused(model: Path, seed: int) -> None:
    rng = random.Random(seed)
    (model / UNET).unlink()
    refused = 0
    for _ in range(100):
        content = bytearray(rng.choice([PICKLE, LEGACY]))
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content) // 2)] = rng.randrange(256)
        (model / BIN).write_bytes(content)
        message = outcome(model, allow_pickle=True)
        assert not message or BIN in message, message
        refused += message is not None
    assert refused > 30, "the mutations hardly damage anything"


# Layout and JSON


def without(name: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        path = model / name
        if path.is_dir():
            path.rename(model / "elsewhere")
        else:
            path.unlink()

    return remove


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None


def pipeline(name: object) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "model_index.json", _class_name=name)


CONFIG = "unet/config.json"
LAYOUT_FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no index": (without("model_index.json"), "model_index.json", "is no diffusers folder"),
    "no unet": (without("unet"), "unet/", "is missing"),
    "no vae": (without("vae"), "vae/", "is missing"),
    "no text encoder": (without("text_encoder"), "text_encoder/", "is missing"),
    "no scheduler": (without("scheduler"), "scheduler/", "is missing"),
    "no tokenizer": (without("tokenizer"), "tokenizer/", "is missing"),
    "no merges": (without("tokenizer/merges.txt"), "tokenizer/", "merges.txt"),
    "no config": (without(CONFIG), CONFIG, "is missing"),
    "no scheduler config": (without("scheduler/scheduler_config.json"), "scheduler_config.json", "is missing"),
    "no weights": (without(UNET), "unet/", "no usable weights.*files there: config.json"),
    "empty JSON": (written(CONFIG, b""), CONFIG, "not valid JSON"),
    "JSON of a list": (written(CONFIG, b"[]"), CONFIG, "holds a list, not an object"),
    "JSON of null": (written(CONFIG, b"null"), CONFIG, "holds a NoneType, not an object"),
    "cut JSON": (written(CONFIG, b'{"in_channels": 4,'), CONFIG, "not valid JSON"),
    "JSON with duplicates": (written(CONFIG, b'{"a": 1, "b": 2, "a": 3}'), CONFIG, "'a' occurs twice"),
    "nested duplicates": (written(CONFIG, b'{"x": {"a": 1, "a": 3}}'), CONFIG, "'a' occurs twice"),
    "NaN": (written(CONFIG, b'{"norm_eps": NaN}'), CONFIG, "NaN is not a JSON number"),
    "infinity": (written(CONFIG, b'{"norm_eps": -Infinity}'), CONFIG, "Infinity is not a JSON number"),
    "a number that overflows": (written(CONFIG, b'{"norm_eps": 1e999}'), CONFIG, "1e999 is out of range"),
    "UTF-16": (written(CONFIG, '{"a": 1}'.encode("utf-16")), CONFIG, "not valid JSON"),
    "deep JSON": (written(CONFIG, b'{"a":' * 90_000), CONFIG, "nested too deeply"),
    "100 MB of JSON": (written(CONFIG, b'{"a": "' + b" " * 100 * 2**20 + b'"}'), CONFIG, "larger than 4 MB"),
    "a pipe": (lambda m: ((m / CONFIG).unlink(), os.mkfifo(m / CONFIG)), CONFIG, "is missing"),
    "a folder for a file": (lambda m: ((m / CONFIG).unlink(), (m / CONFIG).mkdir()), CONFIG, "is missing"),
    "weights in a folder": (lambda m: ((m / UNET).unlink(), (m / UNET).mkdir()), UNET, "is missing"),
    "dangling link": (lambda m: ((m / UNET).unlink(), (m / UNET).symlink_to(m / "gone")), UNET, "is missing"),
    "SDXL": (
        pipeline("StableDiffusionXLPipeline"),
        "model_index.json",
        "StableDiffusionXLPipeline .Stable Diffusion XL",
    ),
    "SD3": (pipeline("StableDiffusion3Pipeline"), "model_index.json", "Stable Diffusion 3"),
    "FLUX": (pipeline("FluxPipeline"), "model_index.json", "FLUX"),
    "inpainting of SDXL": (pipeline("StableDiffusionXLInpaintPipeline"), "model_index.json", "Stable Diffusion XL"),
    "a pipeline nobody knows": (pipeline("a\nb\x1b" * 99), "model_index.json", "names the pipeline"),
    "a pipeline of no string": (pipeline(["x"]), "model_index.json", "names the pipeline"),
    "no pipeline": (pipeline(None), "model_index.json", "names the pipeline None"),
    "transformer": (lambda m: (m / "unet").rename(m / "transformer"), "transformer/", "in place of unet/"),
    "VAE config in the UNet's place": (
        lambda m: edit_json(m / CONFIG, _class_name="AutoencoderKL"),
        CONFIG,
        "describes a AutoencoderKL, not a UNet2DConditionModel",
    ),
    "tiny VAE": (
        lambda m: edit_json(m / "vae/config.json", _class_name="AutoencoderTiny"),
        "vae/config.json",
        "AutoencoderTiny",
    ),
    "T5": (
        lambda m: edit_json(m / "text_encoder/config.json", architectures=["T5EncoderModel"]),
        "text_encoder/config.json",
        "T5EncoderModel.*not a CLIPTextModel",
    ),
    "instructions config": (lambda m: edit_json(m / CONFIG, in_channels=8), CONFIG, "InstructPix2Pix UNet"),
}


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_layout_fault(model: Path, fault: str) -> None:
    break_it, named, reason = LAYOUT_FAULTS[fault]
    break_it(model)
    assert_refused(model, named, reason)
    assert open_folder(SMALL_MODEL).unet["in_channels"] == 4, "the next, valid folder must open"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "no diffusers folder"),
        (["v1-5-pruned.safetensors"], r"single-file checkpoints \(v1-5-pruned.safetensors\); give the path"),
        (["model.ckpt", "note.txt"], r"single-file checkpoints \(model.ckpt\)"),
        (["pytorch_lora_weights.safetensors"], "holds a LoRA"),
        (["transformer/config.json"], "transformer/ in place of unet/"),
    ],
)
def test_folders_of_another_kind(tmp_path: Path, names: list[str], reason: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert_refused(folder, "folder", reason)


def test_component_folder(model: Path) -> None:
    assert_refused(model / "unet", "unet", "holds a UNet2DConditionModel, not a whole pipeline")


@pytest.mark.parametrize("path", ["nowhere", "no\0where", "no\nwhere", "x" * 5000, "unet/config.json/deeper"])
def test_path_that_does_not_exist(model: Path, path: str) -> None:
    assert_refused(model / path, "", "no such folder")


def test_single_file_instead_of_a_folder(model: Path) -> None:
    assert_refused(model / UNET, "safetensors", "is a single file, .* open it with Pipeline.from_single_file")


def test_code_in_the_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    for name in ("pipeline.py", "unet/modeling.py", "unet/__init__.py", "unet/config.py"):
        (model / name).write_text(f"open({str(marker)!r}, 'w')")
    auto_map = {"AutoModel": "modeling.Net", "AutoConfig": "modeling.Config"}
    edit_json(model / CONFIG, auto_map=auto_map, custom_pipeline="pipeline.py")
    edit_json(model / "model_index.json", unet=["modeling", "Net"])
    load(model)
    assert not marker.exists()


# Architectures


LDM = {"model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"}
KINDS: dict[str, tuple[str, set[str], str]] = {
    "LDM": ("unet", LDM, "single-file checkpoint .LDM keys., to be opened by .*from_single_file"),
    "SDXL in one file": ("unet", LDM | {"conditioner.embedders.0.transformer.x"}, "single-file Stable Diffusion XL"),
    "SD3 in one file": ("unet", {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"}, "Stable Diffusion 3"),
    "SDXL": ("unet", {"add_embedding.linear_1.weight", "conv_in.weight"}, "Stable Diffusion XL UNet"),
    "SDXL's encoder": (
        "text_encoder",
        {"text_model.final_layer_norm.weight", "text_projection.weight"},
        "text_encoder_2",
    ),
    "SD3": ("unet", {"transformer_blocks.0.norm1_context.linear.weight"}, "Stable Diffusion 3"),
    "FLUX": ("unet", {"single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"}, "FLUX"),
    "FLUX, original": ("unet", {"double_blocks.0.img_attn.qkv.weight"}, "FLUX"),
    "ControlNet": ("unet", {"controlnet_cond_embedding.conv_in.weight", "conv_in.weight"}, "a ControlNet"),
    "ControlNet, original": ("unet", {"control_model.input_hint_block.0.weight"}, "a ControlNet"),
    "LoRA": ("unet", {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"}, "a LoRA"),
    "LoRA, kohya": ("unet", {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"}, "a LoRA"),
    "LoRA, older": ("unet", {"down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight"}, "a LoRA"),
    "T5": ("text_encoder", {"encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"}, "T5"),
    "CLIP vision": ("text_encoder", {"vision_model.embeddings.class_embedding"}, "a CLIP image model"),
    "AnimateDiff": ("unet", {"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"}, "AnimateDiff"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_architecture_is_named(model: Path, kind: str) -> None:
    component, names, reason = KINDS[kind]
    file = UNET if component == "unet" else "text_encoder/model.safetensors"
    (model / file).write_bytes(safetensors.torch.save({name: torch.zeros(1) for name in names}))
    with pytest.raises(CheckpointError, match=f"{file}: this is .*{reason}"):
        open_folder(model).load_weights(component, meta_net(), torch.float32, CPU)


@pytest.mark.parametrize(
    ("component", "given", "reason"),
    [
        ("unet", "vae", "the VAE, in the place of the UNet"),
        ("vae", "unet", "the UNet, in the place of the VAE"),
        ("text_encoder", "unet", "the UNet, in the place of the text encoder"),
        ("unet", "text_encoder", "the text encoder, in the place of the UNet"),
    ],
)
def test_swapped_files(model: Path, component: str, given: str, reason: str) -> None:
    for file in (model / component).glob("*.safetensors"):
        file.write_bytes(safetensors.torch.save(small_model_state(given)))
    with pytest.raises(CheckpointError, match=f"{component}/.*: this is {reason}"):
        open_folder(model).load_weights(component, meta_net(), torch.float32, CPU)


def test_inpainting_weights(model: Path) -> None:
    net = torch.nn.Module()
    net.conv_in = torch.nn.Conv2d(4, 8, 3, device="meta")
    (model / UNET).write_bytes(
        safetensors.torch.save({"conv_in.weight": torch.zeros(8, 9, 3, 3), "conv_in.bias": torch.zeros(8)})
    )
    with pytest.raises(
        CheckpointError, match=r"inpainting UNet .*conv_in.weight expected \[8, 4, 3, 3\], found \[8, 9, 3, 3\]"
    ):
        open_folder(model).load_weights("unet", net, torch.float32, CPU)


def test_a_lack_of_tensors_is_not_called_another_architecture(model: Path) -> None:
    state = small_model_state("unet")
    del state["mid_block.resnets.0.conv1.weight"]
    (model / UNET).write_bytes(safetensors.torch.save(state))
    import diffusers

    folder = open_folder(model)
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel.from_config(folder.unet)
    with pytest.raises(CheckpointError, match=r"1 missing \(mid_block.resnets.0.conv1.weight\)$") as caught:
        folder.load_weights("unet", net, torch.float32, CPU)
    assert "this is" not in str(caught.value)
