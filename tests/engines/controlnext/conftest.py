from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.checkpoints.source import DType
from engines.controlnext.checkpoint import load_control_net, load_diffusers_unet
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.demo_weights import write_demo_weights
from engines.controlnext.denoise import Denoise
from engines.controlnext.spec import ControlNeXtConditioning
from engines.sampling import seeded_generator
from tests.engines.controlnext.reference import ReferenceControlNet, stirred

HEIGHT, WIDTH = 64, 48


@pytest.fixture(scope="session")
def controlnext_weights(tmp_path_factory: pytest.TempPathFactory) -> ControlNeXtWeights:
    """The demo's weights with noise on all constants: equal blend factors and unit norms would hide a mix-up."""
    weights = write_demo_weights(tmp_path_factory.mktemp("weights") / "controlnext")
    for source, load in ((weights.unet, load_diffusers_unet), (weights.control, load_control_net)):
        assert source.folder is not None
        assert source.file is not None
        module: Any = stirred(load(ControlNeXtConfig(weights=weights)), seed=5)
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, source.folder / source.file)
    return weights


@pytest.fixture(scope="session")
def denoise(controlnext_weights: ControlNeXtWeights) -> Denoise:
    return Denoise(ControlNeXtConfig(weights=controlnext_weights, threads=1))


@pytest.fixture(scope="session")
def precise(controlnext_weights: ControlNeXtWeights) -> Denoise:
    return Denoise(ControlNeXtConfig(weights=controlnext_weights, dtype="float64", threads=1))


def reference_nets(weights: ControlNeXtWeights, dtype: DType = "float32") -> tuple[Any, ReferenceControlNet]:
    """The same weights in diffusers' UNet and in the tests' reference control net."""
    config = ControlNeXtConfig(weights=weights, dtype=dtype)
    net = ReferenceControlNet(
        stem_channels=(16, 16, 32), level_channels=(32, 64), out_channels=32, time_channels=32, time_embed_dim=64
    )
    path: Path = weights.control.folder / weights.control.file  # type: ignore[operator]
    net.load_state_dict(load_file(path), strict=True)
    return load_diffusers_unet(config), net.to(getattr(torch, dtype)).eval().requires_grad_(False)


def conditioning(num_frames: int, **changes: Any) -> ControlNeXtConditioning:
    """Noise in place of preprocessed inputs, so that no values in it are zero or equal by chance."""
    generator = torch.Generator().manual_seed(num_frames)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values: dict[str, Any] = {
        "seed": 7,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "rng_state": seeded_generator(7).get_state(),
        "notes": (),
        "poses": torch.randint(0, 256, (num_frames, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8),
        "image_embedding": randn(1, 32),
        "image_latent": randn(4, HEIGHT // 8, WIDTH // 8),
        "added_ids": (6.0, 127.0, 0.02),
        "batch_frames": 6,
        "overlap": 2,
        "controlnext_cond_scale": 1.0,
        "decode_chunk_size": 2,
        "fps": 7,
    }
    return ControlNeXtConditioning(**(values | changes))


def first_noise(num_frames: int, seed: int = 7) -> Tensor:
    """(1, N, 4, h, w): what `Denoise` draws for such a conditioning."""
    return torch.randn((1, num_frames, 4, HEIGHT // 8, WIDTH // 8), generator=seeded_generator(seed))
