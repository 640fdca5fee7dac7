import copy

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from engines.bench.nets import TINY_ANIMATEDIFF
from engines.demo.checkpoint import live
from engines.diffusion.vae import fuse
from kernels.choice import forced


@pytest.mark.parametrize("back_end", ["kernels", "pytorch"])
@torch.inference_mode()
def test_a_fused_decoder_gives_the_images_of_diffusers(back_end):
    torch.manual_seed(0)
    stock = live(AutoencoderKL(**TINY_ANIMATEDIFF.vae)).double().eval()
    ours = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    fuse(ours.decoder)
    assert not any(isinstance(module, ResnetBlock2D) for module in ours.decoder.modules())
    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    expected = stock.decode(latents).sample
    with forced(back_end):
        images = ours.decode(latents).sample
    assert expected.std() > 0.01, "nearly constant values: the comparison would show nothing"
    assert (images - expected).abs().max() <= 1e-11 * expected.abs().max()
