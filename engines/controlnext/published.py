"""The published nets' sizes, for who builds them without their checkpoints. What is not named is the diffusers class's default.

`video-models.md`, section 1B; a test holds what they compute to its section 4. The control net's are `ControlNetSize`'s own.
"""

from typing import Any

UNET: dict[str, Any] = {"num_attention_heads": (5, 10, 20, 20)}
"""The class default of the heads, 5, 10, 10, 20, is not what was published."""
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
