"""The nets of the ControlNeXt demo. Classes and layouts are the served model's."""

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from engines.controlnext.demo_weights import image_encoder
from engines.controlnext.nets.control_net import ControlNet, ControlNetSize
from engines.controlnext.nets.unet import Control, inject
from engines.demo.controlnext.autoencoder import CHANNELS, SCALE
from engines.demo.controlnext.puppets import SIDE
from engines.demo.cpu_speed import use_flat_temporal_convs, use_plain_attention

WIDTHS = (64, 96)
"""Multiples of 32, as SVD fixes 32 norm groups, and at least 64, so that a norm does not erase plain colours."""
EMBEDDING = 32
TIME_WIDTH = 32
CONTROL = ControlNetSize(stem=(8, 8, 16), levels=(16, 48), out=WIDTHS[0], time=TIME_WIDTH)
LATENT = SIDE // SCALE
LATENT_SCALING = 0.18215

_TRUNK = (LATENT // 2, LATENT // 2)
_SPATIAL = 2.0  # of the blend factors at first: sigmoid(2) = 0.88 of each frame's own features, the rest from its neighbours


def new_unet() -> UNetSpatioTemporalConditionModel:
    """Two levels of one layer."""
    unet = UNetSpatioTemporalConditionModel(
        sample_size=LATENT,
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=WIDTHS,
        num_attention_heads=(4, 4),
        layers_per_block=1,
        cross_attention_dim=EMBEDDING,
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=3 * TIME_WIDTH,
    )
    with torch.no_grad():
        unet.conv_in.weight[:, CHANNELS:] *= LATENT_SCALING  # the reference's latents come unscaled
        for name, parameter in unet.named_parameters():
            if name.endswith("mix_factor"):
                parameter.fill_(_SPATIAL)
    return unet


def new_image_encoder() -> CLIPVisionModelWithProjection:
    """Stays random: colours come through the reference's latents."""
    return image_encoder(EMBEDDING)


class PuppetNets(nn.Module):
    """The UNet and the control net, joined as they are served."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.control = new_unet(), ControlNet(CONTROL)
        use_plain_attention(self.unet)
        use_flat_temporal_convs(self.unet)
        self.unet.down_blocks[0].register_forward_hook(self._inject)
        self._maps: Tensor | None = None
        self._kept: Tensor | None = None

    def forward(
        self,
        noisy: Tensor,
        sigmas: Tensor,
        image: Tensor,
        embedding: Tensor,
        poses: Tensor,
        ids: Tensor,
        conditional: Tensor,
    ) -> Tensor:
        """v, (B, F, 16, 16, 16), for clips at their noise levels.

        noisy: (B, F, 16, 16, 16), scaled for the model. sigmas: (B,). image: (B, 16, 16, 16), unscaled. embedding: (B, 32).
        poses: (B, F, 3, 256, 256) in [0, 1]. ids: (B, 3). conditional: (B,), 1.0, or 0.0 to leave image and poses out.
        """
        frames = noisy.shape[1]
        times = 0.25 * sigmas.log()
        time = self.control.time_embedding(self.control.time_proj(times)).repeat_interleave(frames, dim=0)
        self._maps = self.control.finish(self.control.prefix(poses.flatten(0, 1)), time, _TRUNK)
        self._kept = conditional.repeat_interleave(frames)[:, None, None, None]
        image = image * conditional[:, None, None, None]
        whole = torch.cat([noisy, image[:, None].expand(-1, frames, -1, -1, -1)], dim=2)
        context = (embedding * conditional[:, None])[:, None]  # (B, 1, 32)
        return self.unet(whole, times, context, added_time_ids=ids).sample

    def _inject(self, _: nn.Module, __: object, output: tuple[Tensor, tuple[Tensor, ...]]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Into the trunk after the first block, but not into its skips."""
        trunk, skips = output
        assert self._maps is not None
        assert self._kept is not None
        controlled = inject(trunk, Control(self._maps, 1.0))
        return trunk + self._kept * (controlled - trunk), skips
