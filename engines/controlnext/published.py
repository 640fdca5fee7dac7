"""The published nets' sizes, for building them without their checkpoints. Sizes not given are the diffusers class's defaults.

Source: `video-models.md`, section 1B. A test compares the nets' operation counts with its section 4. The control net's sizes are
the defaults of `ControlNetSize`.
"""

from typing import Any

UNET: dict[str, Any] = {"num_attention_heads": (5, 10, 20, 20)}
"""The published numbers of heads; the class's default is 5, 10, 10, 20."""
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
