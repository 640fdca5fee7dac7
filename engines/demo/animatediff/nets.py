"""The nets of the AnimateDiff demo: sizes, and the start that training needs. Classes and layouts are the served model's."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import MotionAdapter, SparseControlNetModel, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engines.demo.animatediff.grammar import SIDE
from engines.demo.cpu_speed import use_plain_attention

WIDTH = 64
"""Of the text embedding."""
CHANNELS = (48, 80)
HEADS = 4
GROUPS = 8
TOKENS = 77
LATENT = SIDE // 8


def new_unet() -> UNet2DConditionModel:
    """The UNet of single images."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
        norm_num_groups=GROUPS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )


def new_motion_adapter() -> MotionAdapter:
    """Motion modules that change nothing yet."""
    adapter = MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        motion_num_attention_heads=HEADS,
        motion_norm_num_groups=GROUPS,
        motion_max_seq_length=32,
        use_motion_mid_block=True,
    )
    for name, module in adapter.named_modules():
        if name.endswith("proj_out"):
            assert isinstance(module, nn.Linear)
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return adapter


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_sparse_control(simplified: bool) -> SparseControlNetModel:
    """simplified: for rgb keyframes, which come as latents."""
    return SparseControlNetModel(
        conditioning_channels=4 if simplified else 3,
        use_simplified_condition_embedding=simplified,
        conditioning_embedding_out_channels=(8, 16, 32, 64),  # three stride-2 stages: 64 pixels become 8
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
        motion_num_attention_heads=HEADS,
        norm_num_groups=GROUPS,
    )


class ImageNets(nn.Module):
    """The text encoder and the UNet of single images."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text, self.unet = new_text_encoder(tokenizer), new_unet()
        use_plain_attention(self)


class ClipNets(nn.Module):
    """The text encoder, the motion UNet and both SparseCtrl nets. shown: which of the 16 frames it gets; None is all."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text = new_text_encoder(tokenizer)
        self.unet = UNetMotionModel.from_unet2d(new_unet(), new_motion_adapter())
        self.scribble, self.rgb = new_sparse_control(simplified=False), new_sparse_control(simplified=True)
        use_plain_attention(self)
        self.shown: list[int] | None = None
        for module in self.modules():
            if isinstance(module, SinusoidalPositionalEmbedding):
                module.forward = partial(self._placed, module)

    def _placed(self, embedding: SinusoidalPositionalEmbedding, x: Tensor) -> Tensor:
        """x: (N, F, C). The frames that are `shown` get their own positions, as in the whole clip."""
        rows = slice(x.shape[1]) if self.shown is None else self.shown
        return x + embedding.pe[:, rows]

    def begin(self, images: ImageNets, scribbles: Tensor, latents: Tensor) -> None:
        """Start from what was learnt on images; SparseCtrl from the UNet's encoder, with embeddings that see real keyframes.

        scribbles: (N, 4, 64, 64), latents: (N, 5, 8, 8): keyframes with their masks.
        """
        self.text.load_state_dict(images.text.state_dict())
        self.unet.load_state_dict(images.unet.state_dict(), strict=False)  # all but the motion modules
        for control, keyframes in ((self.scribble, scribbles), (self.rgb, latents)):
            own, learnt = control.state_dict(), self.unet.state_dict()
            fitting = {key: value for key, value in learnt.items() if key in own and own[key].shape == value.shape}
            control.load_state_dict(fitting, strict=False)
            awaken(control.controlnet_cond_embedding, keyframes)


@torch.no_grad()
def awaken(embedding: nn.Module, keyframes: Tensor) -> None:
    """Weights with which every layer's output has unit variance on real keyframes.

    At their usual initialisation seven convolutions shrink a thin outline to nothing, and SparseCtrl never learns to see it.
    """

    def scale(layer: nn.Conv2d, _: object, output: Tensor) -> Tensor:
        layer.weight /= output.std()
        return output / output.std()

    layers = [module for module in embedding.modules() if isinstance(module, nn.Conv2d)]
    hooks = []
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        hooks.append(layer.register_forward_hook(scale))
    embedding(keyframes)
    for hook in hooks:
        hook.remove()


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """(B, 77): padded, as the served model does it."""
    given = [tokenizer(prompt, verbose=False).input_ids[:TOKENS] for prompt in prompts]
    return torch.tensor([ids + [tokenizer.pad_token_id] * (TOKENS - len(ids)) for ids in given])


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer that `engines.demo.animatediff.tokenizer` wrote."""
    return CLIPTokenizer.from_pretrained(folder)
