from dataclasses import replace

import pytest
import torch
from torch import nn

from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.trt.profiles import profile_of
from engines.backends.unet_call import UNetCall
from engines.errors import EngineError

CALL = UNetCall(
    "a UNet",
    nn.Identity(),
    {"latents": torch.zeros(2, 4, 2, 8, 8), "time": torch.zeros(1, 3)},
    {"latents": (2, 4, "frames", "height", "width"), "time": (1, 3), "skip_0": ("2*frames", 8, "height/8", "width/8")},
    8,
)
FAMILY = ShapeFamily(Shape(8, 64, 64), Shape(16, 64, 64), Shape(32, 64, 96))


def test_a_profile_names_every_input_that_changes_and_no_other():
    profile = profile_of(CALL, FAMILY)
    assert set(profile) == {"latents", "skip_0"}
    assert profile["skip_0"].smallest == (16, 8, 8, 8)
    assert profile["skip_0"].largest == (64, 8, 8, 12)
    assert profile["latents"].best == (2, 4, 16, 64, 64)


def test_a_family_out_of_order_is_refused():
    for wrong in (replace(FAMILY, best=Shape(33, 64, 64)), replace(FAMILY, smallest=Shape(8, 128, 64))):
        with pytest.raises(EngineError, match="out of order"):
            profile_of(CALL, wrong)


def test_a_family_that_the_unet_cannot_halve_is_refused():
    with pytest.raises(EngineError, match="height 60"):
        profile_of(CALL, ShapeFamily.fixed(16, 60, 64))
