"""The published nets' sizes, for building them without their checkpoints. Sizes not given are the diffusers class's defaults.

Source: `video-models.md`, section 1A. A test compares the nets' operation counts with its section 4.
"""

from typing import Any

UNET: dict[str, Any] = {"cross_attention_dim": 768, "use_motion_mid_block": True}
SPARSE_CONTROL: dict[str, Any] = {"conditioning_channels": 3, "use_simplified_condition_embedding": False}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
