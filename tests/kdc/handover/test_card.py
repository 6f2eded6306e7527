"""What a model card says, and that it is so: tried with diffusers."""

import pytest
import torch
from diffusers import ControlNetModel

import kdc
from kdc.handover.card import _skips, model_card
from tests.helpers import head_of
from tests.robustness.trials import narrow


@pytest.fixture(scope="module")
def pipeline():
    return narrow()


def test_what_is_not_known_is_said_to_be_so(pipeline):
    card = model_card(kdc.slim(pipeline.unet, "bk-base"), pipeline.unet, {})
    assert card.count("not recorded") == 5 and "It is not known for a teacher" in card
    assert "license" not in head_of(card) and "None were given" in card
    for name in ("sd-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        named = model_card(pipeline.unet, pipeline.unet, {}, teacher_name=name)
        assert head_of(named)["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
        assert head_of(named)["license"] == "creativeml-openrail-m"
    assert "mid-block" not in named and "ControlNet" not in named, "nothing was taken out"


def test_what_the_card_says_of_controlnets_is_so(pipeline):
    """Tried with diffusers: residuals of a teacher's ControlNet, and one begun from the student."""
    whole = ControlNetModel.from_unet(pipeline.unet)
    width = pipeline.unet.config.cross_attention_dim
    inputs = torch.zeros(1, 4, 16, 16), torch.tensor(3), torch.zeros(1, 8, width)
    down, mid = whole(*inputs, torch.zeros(1, 3, 128, 128), return_dict=False)
    for name, plan in kdc.PLANS.items():
        unet = kdc.slim(pipeline.unet, plan)
        card = model_card(unet, pipeline.unet, {})
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        if name == "full":
            unet(*inputs, **more)
            continue
        said = f"adds 12 residuals to the skip connections, and this U-Net has {_skips(unet)}"
        assert len(down) == 12 and said in card
        with pytest.raises(RuntimeError, match="must match"):
            unet(*inputs, **more)
        if plan.mid:
            assert "no mid-block.**" not in card
            assert len(ControlNetModel.from_unet(unet).controlnet_down_blocks) == _skips(unet)
        else:
            assert "The plans that keep the mid-block are bk-base, kdc-v2" in card
            with pytest.raises(ValueError, match="unknown mid_block_type : None"):
                ControlNetModel.from_unet(unet)
        assert ("FreeU acts on other stages" in card) == bool(plan.dropped)
