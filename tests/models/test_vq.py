"""The vector-quantised autoencoders against diffusers' VQModel with the same weights."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.checkpoints.weight_files import open_weights
from fastsd.checkpoints.weights import fill_module
from fastsd.config import VQConfig
from fastsd.errors import CheckpointError, ParameterError
from fastsd.ldm_autoencoder import config_from_ldm
from fastsd.models import vq
from fastsd.models.vq import VQ, Codebook
from tests import oracle
from tests.models.test_vae_family import diffusers_config, ldm_params
from tests.tolerances import NET

F4 = ldm_params((1, 2, 4), 3, double_z=False) | {"n_embed": 300}
FAMILY = {
    "vq-f4": F4,
    "vq-f8": ldm_params((1, 2, 2, 4), 4, (32,), double_z=False) | {"n_embed": 64},
    "vq-f16": ldm_params((1, 1, 2, 2, 4), 8, (16,), double_z=False) | {"n_embed": 500},
    "narrower entries": ldm_params((1, 2), 6, double_z=False) | {"n_embed": 128, "embed_dim": 4},
}


def vq_model(params: dict[str, Any], scaling_factor: float = 0.4, **more: Any) -> diffusers.VQModel:
    codebook = {"num_vq_embeddings": params["n_embed"], "vq_embed_dim": params["embed_dim"]}
    settings = diffusers_config(params) | codebook | {"scaling_factor": scaling_factor} | more
    return oracle.randomise(diffusers.VQModel(**settings))


def load(theirs: diffusers.VQModel) -> VQ:
    ours = VQ(VQConfig.from_json(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval()


@pytest.fixture(scope="module", params=FAMILY)
def nets(request: pytest.FixtureRequest) -> tuple[diffusers.VQModel, VQ]:
    params = FAMILY[request.param]
    theirs = vq_model(params)
    ours = load(theirs)
    assert ours.config == config_from_ldm(params, scaling_factor=0.4)
    return theirs, ours


def image(ours: VQ) -> Tensor:
    """Its height and width are odd at every level."""
    size = (4 * ours.config.downscale - 1, 3 * ours.config.downscale - 1)
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def unscaled(ours: VQ) -> Tensor:
    """Latents as VQModel knows them, of about the codebook's size. [2, C, 5, 3]."""
    return torch.randn(2, ours.config.latent_channels, 5, 3, generator=torch.Generator().manual_seed(4))


@torch.inference_mode()
def test_encode_equals_diffusers(nets: tuple[diffusers.VQModel, VQ]) -> None:
    """Latents before they are quantised, times the scaling factor; and their entries are the same."""
    theirs, ours = nets
    expected = theirs.encode(image(ours)).latents
    latents = ours.encode(oracle.nhwc(image(ours)))
    oracle.assert_close(oracle.nchw(latents), expected * 0.4, NET, "latents")
    assert torch.equal(ours.quantise(latents)[1].flatten(), theirs.quantize(expected)[2][2])


@torch.inference_mode()
def test_quantise_equals_diffusers(nets: tuple[diffusers.VQModel, VQ]) -> None:
    theirs, ours = nets
    expected, _, (_, _, indices) = theirs.quantize(unscaled(ours))
    values, ours_indices = ours.quantise(oracle.nhwc(unscaled(ours)) * 0.4)
    assert ours_indices.shape == (2, 5, 3)
    oracle.assert_equal(ours_indices.flatten(), indices, "indices")
    assert len(indices.unique()) > 10, "too few of the entries are met for this to compare anything"
    oracle.assert_close(oracle.nchw(values), expected * 0.4, NET, "entries")


@torch.inference_mode()
def test_decode_equals_diffusers(nets: tuple[diffusers.VQModel, VQ]) -> None:
    theirs, ours = nets
    latents = oracle.nhwc(unscaled(ours)) * 0.4
    quantised = theirs.decode(unscaled(ours)).sample
    as_they_are = theirs.decode(unscaled(ours), force_not_quantize=True).sample
    assert (quantised - as_they_are).abs().max() > 0.1
    oracle.assert_close(oracle.nchw(ours.decode(latents)), quantised, NET, "image")
    forced = ours.decode(latents, force_not_quantize=True)
    oracle.assert_close(oracle.nchw(forced), as_they_are, NET, "image of latents that are not quantised")


@torch.inference_mode()
def test_decode_indices_equals_diffusers() -> None:
    """VQModel has it for configs with lookup_from_codebook, as aMUSEd's, whose autoencoder has no attention either."""
    theirs = vq_model(F4, lookup_from_codebook=True, mid_block_add_attention=False)
    ours = load(theirs)
    indices = torch.randint(300, (2, 4, 3), generator=torch.Generator().manual_seed(5))
    expected = theirs.decode(indices.flatten(), force_not_quantize=True, shape=(2, 4, 3, 3)).sample
    oracle.assert_close(oracle.nchw(ours.decode_indices(indices)), expected, NET, "image")
    values = ours.quantize.entries(indices) * ours.config.scaling_factor
    assert torch.equal(ours.quantise(values)[1], indices), "an entry is nearest to itself"


def codebook(weight: Tensor) -> Codebook:
    book = Codebook(*weight.shape)
    book.load_state_dict({"embedding.weight": weight})
    return book.to(weight.dtype)


def entries(size: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(6)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_the_nearest_of_stored_values(dtype: torch.dtype) -> None:
    """Half-precision latents and entries are compared in fp32: in their own precision neighbours would be confused."""
    weight = entries(1000, 4, dtype)
    z = torch.randn(7, 9, 4, generator=torch.Generator().manual_seed(7)).to(dtype)
    distances = (z.double()[..., None, :] - weight.double()).square().sum(-1)  # [7, 9, 1000]
    values, indices = codebook(weight)(z)
    nearest = distances.gather(-1, indices[..., None]).squeeze(-1)
    assert ((nearest - distances.amin(-1)) / nearest).max() < 1e-6
    assert torch.equal(values, weight[indices])


@torch.inference_mode()
def test_far_from_the_origin_nothing_is_lost() -> None:
    """Distances of 1e-2 between entries of size 1e3, whose squares are 1e6 and rounded to 0.06."""
    weight = 1000 + torch.arange(50.0)[:, None] * torch.tensor([0.01, 0.01])
    z = weight + 0.001
    assert torch.equal(codebook(weight)(z)[1], torch.arange(50))


@torch.inference_mode()
def test_of_equally_near_entries_it_is_the_first() -> None:
    """Trained codebooks hold entries that never moved apart. 67 of each: no multiple of a vector register's width."""
    weight = entries(33, 5).repeat(67, 1)
    z = torch.randn(200, 5, generator=torch.Generator().manual_seed(8))
    assert codebook(weight)(z)[1].max() < 33
    assert codebook(torch.tensor([[1.0], [-1.0]]))(torch.zeros(3, 1))[1].tolist() == [0, 0, 0]


class Largest(TorchDispatchMode):
    """Watches the operators that run in it for the most values one of them returns."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.values = max(self.values, result.numel())
        return result


@torch.inference_mode()
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither entries by latents by channels, nor entries by latents: the distances come in blocks."""
    book, z = codebook(entries(100, 8)), torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(9))
    expected = book(z)[1]
    monkeypatch.setattr(vq, "DISTANCES", 850)
    with Largest() as largest:
        indices = book(z)[1]
    assert largest.values == 800, "blocks of 8 latents, and the codebook of 800 values"
    assert torch.equal(indices, expected)
    monkeypatch.setattr(vq, "DISTANCES", 1)
    assert torch.equal(book(z)[1], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.inference_mode()
def test_what_is_not_finite_stays_so(value: float) -> None:
    """Else a broken diffusion model's latents would come out as a fine picture of some entry."""
    ours = load(vq_model(F4))
    latents = oracle.nhwc(unscaled(ours))
    latents[1, 2, 1, 0] = value
    values, _ = ours.quantise(latents)
    assert not values[1, 2, 1].isfinite().any()
    assert values.isfinite().sum() == values.numel() - 3
    assert not ours.decode(latents)[1].isfinite().all()


@torch.inference_mode()
def test_bad_latents_and_indices_are_refused() -> None:
    ours = VQ(config_from_ldm(F4))
    with pytest.raises(ParameterError, match=r"^latents must have 3 channels, as the codebook's entries, not 4$"):
        ours.decode(torch.zeros(1, 4, 4, 4))
    for indices in (torch.tensor([[[300]]]), torch.tensor([[[-1]]]), torch.zeros(1, 2, 2), torch.ones(1, 2, 2).bool()):
        with pytest.raises(ParameterError, match=r"^indices must be integers from 0 to 299"):
            ours.decode_indices(indices)


def test_a_codebook_of_another_width_is_refused(tmp_path: Path) -> None:
    """Before anything is read: the file's entries are 3 wide, the config says 4."""
    theirs = vq_model(F4)
    theirs.save_pretrained(tmp_path / "vae")
    with torch.device("meta"):
        ours = VQ(VQConfig.from_json(dict(theirs.config) | {"vq_embed_dim": 4}))
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight"):
        fill_module("vae", open_weights(tmp_path / "vae", "vae", None, False), ours, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("json", "says"),
    [
        ({"norm_type": "spatial"}, "norm_type = 'spatial': must be group; spatial norms are MoVQ's"),
        ({"norm_type": "layer"}, "norm_type = 'layer': must be group"),
        ({"norm_type": None}, "norm_type = None: must be group"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings = 0: must be a positive integer"),
        ({"vq_embed_dim": 0}, "vq_embed_dim = 0: must be a positive integer"),
        ({"act_fn": "relu"}, "act_fn = 'relu': fastsd does not run"),
        ({"scaling_factor": 0}, "scaling_factor = 0: must not be 0"),
    ],
)
def test_settings_that_cannot_run_are_refused(json: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=f"^vae/config.json: {says}"):
        VQConfig.from_json(json)


def test_what_a_file_leaves_out_has_diffusers_default() -> None:
    theirs = diffusers.VQModel()
    ours = VQ(VQConfig.from_json({}))
    assert VQConfig.from_json({}) == VQConfig.from_json(dict(theirs.config))
    assert {key: w.shape for key, w in ours.state_dict().items()} == {
        k: w.shape for k, w in theirs.state_dict().items()
    }
