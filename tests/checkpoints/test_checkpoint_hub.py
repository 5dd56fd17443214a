"""resolve() against a hub served on 127.0.0.1 over real HTTP, in processes whose environment is set as a user would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fastsd
from fastsd.checkpoints import resolve
from fastsd.errors import CheckpointError, HubError
from tests.checkpoints.checkpoint_builders import UNET, net_state
from tests.checkpoints.hub_server import COMMIT, Hub, read_folder
from tests.small_model import SMALL_MODEL

HERE = Path(__file__).parent
MODEL = {name: content for name, content in read_folder(SMALL_MODEL).items() if name != "README.md"}
NEEDED = set(MODEL)
OTHER_FILES = (
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "unet/modeling.py",
    "vae/diffusion_pytorch_model.fp16.bin",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
)

Ask = Callable[..., dict]


class Worker:
    def __init__(self, **environment: str) -> None:
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        fixed = {
            "PYTHONPATH": str(Path(fastsd.__file__).parents[1]),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "hub_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=keep | fixed | environment,
        )

    def __call__(self, name: str, **options: object) -> dict:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"name": name, **options}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub({})
    running = hub.start()
    yield hub
    running.shutdown()


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The server, with the small model beside everything else that repositories hold, and no faults."""
    server.files = MODEL | dict.fromkeys(OTHER_FILES, b"x" * 100)
    server.faults.clear()
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def online(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path_factory.mktemp("home")), HF_TOKEN="hf_of_the_test")
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def offline(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    home = str(tmp_path_factory.mktemp("home"))
    worker = Worker(HF_ENDPOINT=server.url, HF_HOME=home, HF_HUB_OFFLINE="1")
    yield worker
    worker.close()


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def assert_model(answer: dict, files: dict[str, bytes]) -> None:
    """The answer is a folder with just these files."""
    assert "path" in answer, answer
    found = read_folder(Path(answer["path"]))
    assert found.keys() == files.keys()
    assert all(found[name] == content for name, content in files.items())


def assert_hub_error(answer: dict, *words: str) -> None:
    assert answer.get("error") == "HubError", answer
    assert answer["message"].isprintable(), f"more than a line: {answer['message']!r}"
    for word in words:
        assert word in answer["message"], answer["message"]


def test_only_what_is_needed_is_downloaded(hub: Hub, online: Ask, cache: str) -> None:
    answer = online("acme/model", cache_dir=cache)
    assert_model(answer, MODEL)
    assert hub.downloaded() == NEEDED
    assert answer["log"] == [f"acme/model: revision main is commit {COMMIT}"]
    authorisations = {headers.get("authorization") or headers.get("Authorization") for _, _, headers in hub.requests}
    assert authorisations == {"Bearer hf_of_the_test"}, "HF_TOKEN must be respected"


def test_second_call_downloads_nothing(hub: Hub, online: Ask, cache: str) -> None:
    first = online("acme/model", cache_dir=cache)
    hub.requests.clear()
    assert online("acme/model", cache_dir=cache)["path"] == first["path"]
    assert hub.downloaded() == set()


def test_default_cache_is_in_hf_home(hub: Hub, server: Hub, tmp_path: Path) -> None:
    worker = Worker(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"))
    answer = worker("acme/model")
    worker.close()
    assert Path(answer["path"]).is_relative_to(tmp_path / "home"), answer
    assert not any("authorization" in {key.lower() for key in headers} for _, _, headers in hub.requests)


def test_offline_from_the_cache(hub: Hub, online: Ask, offline: Ask, cache: str) -> None:
    first = online("acme/model", cache_dir=cache)
    hub.requests.clear()
    again = offline("acme/model", cache_dir=cache)
    assert_model(again, MODEL)
    assert again["path"] == first["path"]
    local = online("acme/model", cache_dir=cache, local_files_only=True)
    assert local["path"] == first["path"]
    assert hub.requests == []


def test_offline_without_a_cache(hub: Hub, online: Ask, offline: Ask, cache: str) -> None:
    assert_hub_error(offline("acme/model", cache_dir=cache), "acme/model", "offline", "cache", "HF_HUB_OFFLINE")
    assert_hub_error(online("acme/model", cache_dir=cache, local_files_only=True), "acme/model", "local_files_only")
    assert hub.requests == []


def test_offline_with_half_a_cache(hub: Hub, online: Ask, offline: Ask, cache: str) -> None:
    path = Path(online("acme/model", cache_dir=cache)["path"])
    (path / UNET).unlink()
    assert_hub_error(offline("acme/model", cache_dir=cache), "acme/model", "offline", "cache")
    assert_hub_error(online("acme/model", cache_dir=cache, local_files_only=True), "acme/model", "local_files_only")
    assert_model(online("acme/model", cache_dir=cache), MODEL)


def test_pinned_commit_is_not_logged_and_branches_are(hub: Hub, online: Ask, cache: str) -> None:
    assert online("acme/model", cache_dir=cache, revision=COMMIT)["log"] == []
    assert online("acme/model", cache_dir=cache, revision="v1")["log"] == [
        f"acme/model: revision v1 is commit {COMMIT}"
    ]


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("acme/gated", ["gated", "accept its terms", "HF_TOKEN"]),
        ("acme/private", ["401", "private or unknown"]),
        ("acme/bad-token", ["401", "token"]),
        ("acme/unknown", ["no such model on the hub", "no such local folder"]),
        ("acme/broken", ["500"]),
    ],
)
def test_refusals_are_told_apart(hub: Hub, online: Ask, cache: str, repo: str, words: list[str]) -> None:
    assert_hub_error(online(repo, cache_dir=cache), repo, *words)
    assert_model(online("acme/model", cache_dir=cache), MODEL)


def test_unknown_revision(hub: Hub, online: Ask, cache: str) -> None:
    assert_hub_error(online("acme/model", cache_dir=cache, revision="nope"), "acme/model at nope", "no such revision")


def test_nobody_listens(tmp_path: Path) -> None:
    worker = Worker(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    answer = worker("acme/model")
    worker.close()
    assert_hub_error(answer, "acme/model", "network failed", "check the connection")


# Broken downloads


def test_connection_that_breaks_is_resumed(hub: Hub, online: Ask, cache: str) -> None:
    # huggingface_hub keeps what has arrived by chunks of 10 MB
    hub.files[UNET] = safetensors.torch.save(
        {"weight": torch.randn(6 * 2**20, generator=torch.Generator().manual_seed(0))}
    )
    hub.faults[UNET] = "cut once"
    answer = online("acme/model", cache_dir=cache)
    assert (Path(answer["path"]) / UNET).read_bytes() == hub.files[UNET]
    starts = [headers.get("range") or headers.get("Range") for _, path, headers in hub.requests if path.endswith(UNET)]
    assert f"bytes={10 * 2**20}-" in starts, f"what arrived before the cut should not be fetched again: {starts}"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", ["download broke off", "should be of size"]),
        ("corrupt", [UNET, "corrupt", "SHA-256"]),  # of the right size: only the hash tells
        ("error", ["500"]),
    ],
)
def test_bad_download_is_not_kept(
    hub: Hub, online: Ask, offline: Ask, cache: str, fault: str, words: list[str]
) -> None:
    hub.faults[UNET] = fault
    assert_hub_error(online("acme/model", cache_dir=cache), "acme/model", *words)
    assert offline("acme/model", cache_dir=cache)["error"] == "HubError", "half a download must not pass for a model"
    hub.faults.clear()
    assert_model(online("acme/model", cache_dir=cache), MODEL)


# Variants, shards, other models


def weights(variant: str = "") -> dict[str, bytes]:
    data = safetensors.torch.save(net_state())
    stems = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    return {f"{stem}{variant}.safetensors": data for stem in stems}


SMALL = {name: content for name, content in MODEL.items() if not name.endswith(".safetensors")}
UNET_FP16 = {name: data for name, data in weights(".fp16").items() if name.startswith("unet/")}
PLAIN_BUT_UNET = {name: data for name, data in weights().items() if name != UNET}
ALL_VARIANTS = SMALL | weights() | weights(".fp16") | weights(".non_ema")


@pytest.mark.parametrize(
    ("files", "variant", "expected"),
    [
        (ALL_VARIANTS, None, weights()),
        (ALL_VARIANTS, "fp16", weights(".fp16")),
        (SMALL | weights(".fp16"), None, weights(".fp16")),
        (SMALL | weights() | UNET_FP16, "fp16", PLAIN_BUT_UNET | UNET_FP16),
    ],
)
def test_one_variant_is_downloaded(
    hub: Hub, online: Ask, cache: str, files: dict, variant: str | None, expected: dict
) -> None:
    hub.files = files
    assert_model(online("acme/model", cache_dir=cache, variant=variant), SMALL | expected)


def test_plain_after_a_variant(hub: Hub, online: Ask, cache: str) -> None:
    """What was cached earlier does not decide what a call means."""
    hub.files = ALL_VARIANTS
    online("acme/model", cache_dir=cache, variant="fp16")
    assert_model(online("acme/model", cache_dir=cache), SMALL | weights(".fp16") | weights())


def test_shards_are_downloaded(hub: Hub, online: Ask, cache: str) -> None:
    state, weight_map = net_state(), {}
    hub.files = SMALL | weights()
    del hub.files[UNET]
    expected = dict(hub.files)
    for number, names in enumerate((list(state)[:3], list(state)[3:]), start=1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        expected[f"unet/{shard}"] = safetensors.torch.save({name: state[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    expected["unet/diffusion_pytorch_model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    hub.files = expected | {"unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors": b"x"}
    assert_model(online("acme/model", cache_dir=cache), expected)


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (SMALL | weights(), {"variant": "fp16"}, ["no component holds the variant 'fp16'; variants there: plain"]),
        (SMALL, {}, ["unet/ holds no usable weights"]),
        (SMALL | {"unet/diffusion_pytorch_model.bin": b""}, {}, ["is a pickle", "only safetensors are downloaded"]),
        ({"README.md": b"", "model.safetensors": b""}, {}, ["no model_index.json"]),
        ({}, {}, ["no model_index.json"]),
    ],
)
def test_repository_without_the_weights(
    hub: Hub, online: Ask, cache: str, files: dict, options: dict, words: list[str]
) -> None:
    hub.files = files
    assert_hub_error(online("acme/model", cache_dir=cache, **options), "acme/model", *words)


def test_another_architecture_costs_no_weights(hub: Hub, online: Ask, cache: str) -> None:
    hub.files["model_index.json"] = b'{"_class_name": "StableDiffusionXLPipeline"}'
    answer = online("acme/model", cache_dir=cache)
    assert answer["error"] == "CheckpointError", answer
    assert "acme/model" in answer["message"]
    assert "Stable Diffusion XL" in answer["message"]
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


# Names and paths


def test_local_folder_uses_no_socket(hub: Hub, online: Ask, cache: str) -> None:
    answer = online(str(SMALL_MODEL))
    assert answer == {"path": str(SMALL_MODEL), "log": [], "sockets": []}
    assert online("acme/model", cache_dir=cache)["sockets"], "the audit hook of this test does not see sockets"
    assert len(hub.requests) > 0


def test_local_folder_that_looks_like_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("acme/model") == Path("acme/model")


@pytest.mark.parametrize(
    "name",
    [
        *("", "model", "./acme/model", "../acme/model", "/acme/model", "a/b/c", "acme/", "acme/mo del", "acme/.."),
        *("acme/mod--el", "acme\\model", "acme/model\n", "a\0/b", "x" * 5000, "acme/" + "m" * 96),
        "https://example.com/acme/model",
    ],
)
def test_what_is_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder: .*owner/name") as caught:
        resolve(name)
    assert not isinstance(caught.value, HubError), "the hub must not be asked"
    assert str(caught.value).isprintable()


def test_a_path_is_never_an_id() -> None:
    with pytest.raises(CheckpointError, match="no such folder: 'acme/model'"):
        resolve(Path("acme/model"))


# Adapters: one file of a repository


@pytest.fixture
def lora_hub(hub: Hub) -> Hub:
    content = safetensors.torch.save({"x": torch.ones(3)})
    hub.files = {"README.md": b"x", "a [v1].safetensors": content, "deep/b.safetensors": content}
    return hub


def test_the_only_lora_of_a_repository(lora_hub: Hub, online: Ask, offline: Ask, cache: str) -> None:
    answer = online("acme/style", lora=True, cache_dir=cache)
    assert Path(answer["path"]).read_bytes() == lora_hub.files["a [v1].safetensors"]
    assert lora_hub.downloaded() == {"a [v1].safetensors"}
    assert answer["log"] == [f"acme/style: revision main is commit {COMMIT}"]
    lora_hub.requests.clear()
    assert online("acme/style", lora=True, cache_dir=cache)["path"] == answer["path"]
    assert lora_hub.downloaded() == set(), "downloaded again"
    assert offline("acme/style", lora=True, cache_dir=cache)["path"] == answer["path"], "it is in the cache"


def test_a_lora_by_its_name(lora_hub: Hub, online: Ask, cache: str) -> None:
    lora_hub.files["other.safetensors"] = lora_hub.files["deep/b.safetensors"] + b"no header speaks of this"
    answer = online("acme/style", lora=True, cache_dir=cache, weight_name="other.safetensors", revision="v1")
    assert Path(answer["path"]).read_bytes() == lora_hub.files["other.safetensors"]
    assert lora_hub.downloaded() == {"other.safetensors"}
    for options, words in (
        ({}, "say which file with weight_name; files there: README.md, a [v1].safetensors, other.safetensors"),
        ({"weight_name": "c.safetensors"}, "acme/style holds no c.safetensors; files there: README.md"),
        ({"weight_name": "deep/b.safetensors"}, "no plain file name"),
    ):
        refused = online("acme/style", lora=True, cache_dir=cache, **options)
        assert refused.get("error") == "CheckpointError", refused
        assert words in refused["message"]


def test_a_lora_that_cannot_be_had(lora_hub: Hub, online: Ask, offline: Ask, cache: str) -> None:
    assert_hub_error(offline("acme/style", lora=True, cache_dir=cache), "offline", "HF_HUB_OFFLINE")
    assert_hub_error(online("acme/gated", lora=True, cache_dir=cache), "gated", "HF_TOKEN")
    assert_hub_error(online("acme/unknown", lora=True, cache_dir=cache), "no such model on the hub")
    lora_hub.faults["a [v1].safetensors"] = "corrupt"
    assert_hub_error(online("acme/style", lora=True, cache_dir=cache), "corrupt", "try again")
    lora_hub.faults.clear()
    assert "path" in online("acme/style", lora=True, cache_dir=cache), "the corrupt file was kept"
    no_id = online("../style", lora=True, cache_dir=cache)
    assert no_id["error"] == "CheckpointError"
    assert "no such file or folder: ../style" in no_id["message"]


# An autoencoder alone

VAE_FILES = {name.removeprefix("vae/"): content for name, content in MODEL.items() if name.startswith("vae/")}


@pytest.mark.parametrize("folder", ["", "vae/", "vqvae/"])
def test_only_the_autoencoder_is_downloaded(hub: Hub, online: Ask, offline: Ask, cache: str, folder: str) -> None:
    """stabilityai/sd-vae-ft-mse holds it at the top, a pipeline's repository beneath."""
    hub.files = dict.fromkeys(OTHER_FILES, b"x" * 100) | {folder + name: data for name, data in VAE_FILES.items()}
    hub.files |= {folder + "diffusion_pytorch_model.fp16.safetensors": b"x", folder + "deep/config.json": b"x"}
    answer = online("acme/vae", autoencoder=True, cache_dir=cache)
    assert_model(answer, VAE_FILES)
    assert hub.downloaded() == {folder + name for name in VAE_FILES}
    assert answer["log"] == [f"acme/vae: revision main is commit {COMMIT}"]
    hub.requests.clear()
    again = offline("acme/vae", autoencoder=True, cache_dir=cache)
    assert again["path"] == answer["path"], again
    assert hub.requests == []


def test_an_autoencoder_that_cannot_be_had(hub: Hub, online: Ask, offline: Ask, cache: str) -> None:
    assert_hub_error(offline("acme/vae", autoencoder=True, cache_dir=cache), "acme/vae", "offline")
    assert_hub_error(online("acme/gated", autoencoder=True, cache_dir=cache), "gated", "HF_TOKEN")
    hub.files["vae/diffusion_pytorch_model.safetensors"] = safetensors.torch.save({"x": torch.ones(9)})
    hub.faults["vae/diffusion_pytorch_model.safetensors"] = "corrupt"
    assert_hub_error(online("acme/vae", autoencoder=True, cache_dir=cache), "corrupt", "try again")
    hub.faults.clear()
    assert "path" in online("acme/vae", autoencoder=True, cache_dir=cache), "the corrupt file was kept"
    refused = offline("acme/vae", autoencoder=True, cache_dir=cache, variant="fp16")
    assert "path" in refused, "as in a pipeline, the plain file stands in for a variant that is not there"
    for files, words in (
        ({"README.md": b"x", "vae-ft-mse.safetensors": b"x"}, "holds no autoencoder: there is no config.json"),
        (
            {"config.json": b'{"_class_name": "UNet2DConditionModel"}'},
            "describes a UNet2DConditionModel, not a Autoenc",
        ),
        ({"config.json": VAE_FILES["config.json"]}, "vae/ holds no usable weights"),
        (
            {"config.json": VAE_FILES["config.json"], "diffusion_pytorch_model.bin": b"x"},
            "only safetensors are downloaded",
        ),
    ):
        hub.files = files
        hub.requests.clear()
        answer = online("acme/vae", autoencoder=True, cache_dir=f"{cache}-{len(words)}")
        assert words in answer.get("message", ""), answer
        assert "acme/vae" in answer["message"]
        assert answer["message"].isprintable()
        assert not any(name.endswith((".safetensors", ".bin")) for name in hub.downloaded())
