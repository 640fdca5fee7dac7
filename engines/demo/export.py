"""Writes what was trained in the published layouts, in half precision, to be loaded like the published weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from engines.animatediff.config import AnimateDiffWeights
from engines.animatediff.demo_weights import DemoParts
from engines.animatediff.demo_weights import write_parts as write_animatediff_parts
from engines.controlnext.config import ControlNeXtWeights
from engines.controlnext.demo_weights import write_parts as write_controlnext_parts
from engines.demo.animatediff.grammar import words
from engines.demo.animatediff.nets import ClipNets, new_motion_adapter, new_unet
from engines.demo.checkpoint import write_once
from engines.demo.controlnext.nets import CONTROL, PuppetNets

_MOTION = ".motion_modules."


def write_animatediff(folder: Path, vae: AutoencoderKL, nets: ClipNets) -> AnimateDiffWeights:
    """Writes all parts to `folder`, which must not exist. The LoRA changes nothing: the nets were trained for four steps."""
    state: Mapping[str, Tensor] = nets.unet.state_dict()
    unet, adapter = new_unet(), new_motion_adapter()
    unet.load_state_dict({key: value for key, value in state.items() if _MOTION not in key})
    adapter.load_state_dict({key: value for key, value in state.items() if _MOTION in key})
    parts = DemoParts(
        _half(nets.text), _half(unet), _half(vae), _half(adapter), _half(nets.scribble), _half(nets.rgb), _no_lora(state), words()
    )
    write_once(folder, lambda draft: write_animatediff_parts(AnimateDiffWeights.demo(draft), parts))
    return AnimateDiffWeights.demo(folder)


def write_controlnext(
    folder: Path, vae: AutoencoderKLTemporalDecoder, encoder: CLIPVisionModelWithProjection, nets: PuppetNets
) -> ControlNeXtWeights:
    """Writes all parts to `folder`, which must not exist."""
    unet, control = _half(nets.unet), _half(nets.control)

    def write(draft: Path) -> None:
        write_controlnext_parts(ControlNeXtWeights.demo(draft), unet, control, CONTROL, _half(vae), _half(encoder))

    write_once(folder, write)
    return ControlNeXtWeights.demo(folder)


def _half(module: Any) -> Any:
    return module.half()


def _no_lora(unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of rank 1 on one layer, whose upper half is zero."""
    target = next(key for key, value in unet.items() if key.endswith("attn1.to_q.weight"))
    name, weight = "lora_unet_" + target.removesuffix(".weight").replace(".", "_"), unet[target]
    return {
        f"{name}.lora_down.weight": torch.zeros(1, weight.shape[1], dtype=torch.float16),
        f"{name}.lora_up.weight": torch.zeros(weight.shape[0], 1, dtype=torch.float16),
        f"{name}.alpha": torch.tensor(1.0),
    }
