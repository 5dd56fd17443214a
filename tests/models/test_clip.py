"""CLIP's text encoder against transformers' CLIPTextModel with the same weights."""

import pytest
import torch
import transformers

from fastsd.config import CLIPConfig
from fastsd.errors import CheckpointError
from fastsd.models.clip import CLIPText
from tests import oracle
from tests.tolerances import NET


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def nets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[transformers.CLIPTextModel, CLIPText]:
    theirs = oracle.text_encoder({"quick_gelu": oracle.CLIP, "gelu": oracle.OPEN_CLIP}[request.param])
    with torch.device("meta"):
        ours = CLIPText(CLIPConfig.from_json(theirs.config.to_dict()))
    assert ours.config.hidden_act == request.param
    return theirs, oracle.load(ours, theirs, "text_encoder", tmp_path_factory.mktemp("clip"))


def tokens(length: int = 77) -> torch.Tensor:
    return torch.randint(0, 649, (3, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [77, 1, 12])
@torch.inference_mode()
def test_equals_transformers(nets: tuple[transformers.CLIPTextModel, CLIPText], length: int) -> None:
    theirs, ours = nets
    ids = tokens(length)
    oracle.assert_close(ours(ids), theirs(ids).last_hidden_state, NET, "context")


@pytest.mark.parametrize("clip_skip", [1, 2])
@torch.inference_mode()
def test_clip_skip_counts_as_diffusers_does(nets: tuple[transformers.CLIPTextModel, CLIPText], clip_skip: int) -> None:
    theirs, ours = nets
    hidden = theirs(tokens(), output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    norm = getattr(theirs, "text_model", theirs).final_layer_norm
    oracle.assert_close(ours(tokens(), clip_skip=clip_skip), norm(hidden), NET, f"context, clip_skip {clip_skip}")


@torch.inference_mode()
def test_mask_equals_transformers(nets: tuple[transformers.CLIPTextModel, CLIPText]) -> None:
    theirs, ours = nets
    mask = torch.arange(77)[None] < torch.tensor([[5], [40], [77]])
    kept = mask[..., None]
    expected = theirs(tokens(), attention_mask=mask.long()).last_hidden_state
    # What stands at a masked place is nobody's business, and transformers leaves it undefined.
    oracle.assert_close(ours(tokens(), mask=mask) * kept, expected * kept, NET, "masked context")


@torch.inference_mode()
def test_a_token_sees_only_those_before_it(nets: tuple[transformers.CLIPTextModel, CLIPText]) -> None:
    _, ours = nets
    ids = tokens()
    changed = ids.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 649
    before, after = ours(ids), ours(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-5)
    assert (before[:, 40:] - after[:, 40:]).abs().amax(dim=(0, 2)).min() > 1e-4, "a later token missed the change"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_act", "relu", "quick_gelu, gelu"),
        ("num_attention_heads", 5, "multiple"),
        ("vocab_size", "1", "integer"),
    ],
)
def test_a_config_that_cannot_run_says_why(key: str, value: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"text_encoder/config.json: .*{says}"):
        CLIPConfig.from_json({key: value})
