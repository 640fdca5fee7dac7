"""diffusers' pipeline on the same weights: our pipeline must give equal results."""

import torch
from diffusers import AnimateDiffSparseControlNetPipeline, LCMScheduler
from PIL import Image
from torch import Tensor

from engines.animatediff.checkpoint import (
    load_diffusers_sparse_control,
    load_diffusers_unet,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    weights_of,
)
from engines.animatediff.config import AnimateDiffConfig
from engines.animatediff.spec import ControlType


def diffusers_pipeline(config: AnimateDiffConfig, kind: ControlType, prediction_type: str) -> AnimateDiffSparseControlNetPipeline:
    weights = weights_of(config)
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", prediction_type=prediction_type)
    pipe = AnimateDiffSparseControlNetPipeline(
        vae=load_vae(weights, torch.float32),
        text_encoder=load_text_encoder(weights, torch.float32),
        tokenizer=load_tokenizer(weights),
        unet=load_diffusers_unet(config),
        motion_adapter=None,
        controlnet=load_diffusers_sparse_control(config, kind),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_latents(
    pipe: AnimateDiffSparseControlNetPipeline,
    images: list[Image.Image],
    indices: list[int],
    *,
    seed: int,
    **call: object,
) -> Tensor:
    """Final latents with random numbers in our order: rgb posterior, latents, each step's noise, all from one generator."""
    generator = torch.Generator().manual_seed(seed)
    if pipe.controlnet.use_simplified_condition_embedding:
        size = pipe.unet.config.sample_size
        torch.randn((len(images), 4, size, size), generator=generator)  # skips the numbers of the posterior ...
        torch.manual_seed(seed)  # ... which diffusers draws from the global generator
    return pipe(
        conditioning_frames=images,
        controlnet_frame_indices=indices,
        num_frames=16,
        generator=generator,
        output_type="latent",
        **call,
    ).frames
