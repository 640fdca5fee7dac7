"""What is trained is what is served: checkpoints written from the training nets give the same latents in the served stages."""

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from engines.animatediff import denoise as animatediff
from engines.animatediff.config import AnimateDiffConfig
from engines.animatediff.preprocess import Preprocess
from engines.animatediff.spec import AnimateDiffSpec, Keyframe
from engines.controlnext import denoise as controlnext
from engines.controlnext.checkpoint import load_vae
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.spec import ControlNeXtConditioning
from engines.demo.animatediff.autoencoder import new_vae
from engines.demo.animatediff.draw import images, scribbles
from engines.demo.animatediff.frame_table import FrameTable
from engines.demo.animatediff.grammar import Scene, words
from engines.demo.animatediff.nets import ClipNets, load_tokenizer
from engines.demo.animatediff.tasks import ClipTask, scribble_condition
from engines.demo.animatediff.tokenizer import write_tokenizer
from engines.demo.checkpoint import live
from engines.demo.controlnext.autoencoder import CHANNELS
from engines.demo.controlnext.autoencoder import new_vae as new_temporal_vae
from engines.demo.controlnext.nets import PuppetNets, new_image_encoder
from engines.demo.controlnext.tasks import PuppetTask
from engines.demo.export import write_animatediff, write_controlnext

SCENE = Scene("square", "cyan", "left", "grey", across=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, words())
    return load_tokenizer(folder)


def in_half_precision(net: nn.Module) -> nn.Module:
    """Its weights as a checkpoint stores them, in fp32 again."""
    return net.half().float()


@pytest.mark.parametrize("kind", [None, "scribble", "rgb"])
def test_a_clip_in_training_is_the_served_clip(kind: str | None, tokenizer, tmp_path: Path):
    torch.manual_seed(0)
    vae, nets = live(new_vae()), live(ClipNets(tokenizer))
    config = AnimateDiffConfig(weights=write_animatediff(tmp_path / "animatediff", vae, nets), threads=1)
    latents: list[torch.Tensor] = []

    def keep(values: torch.Tensor) -> torch.Tensor:
        latents.append(values)
        return torch.zeros(len(values), 3, 64, 64)

    task = ClipTask(FrameTable(torch.empty(0)), tokenizer, keep)
    task.net = in_half_precision(nets)
    frame, line = 5, scribbles([SCENE], [SCENE.centre(5)], [2.0])[0]
    picture = line if kind == "scribble" else images([SCENE], [SCENE.centre(frame)])[0]
    keyframes = () if kind is None else (Keyframe(frame, png(picture)),)
    spec = AnimateDiffSpec(1, 4, 1.0, SCENE.caption, controlnet_type=kind or "scribble", keyframes=keyframes)
    preprocess = Preprocess(config)
    conditioning = preprocess.encode(spec)
    assert not conditioning.notes
    (note,) = preprocess.encode(replace(spec, prompt="A red dragon, red as wine", keyframes=())).notes
    assert note.startswith("this demo model does not know dragon, as, wine; its words are a, moves, on, circle,")
    condition = None
    if conditioning.control is not None:
        values = conditioning.control.values[0]
        if kind == "scribble":
            drawn = scribble_condition([SCENE], [[frame]], random.Random(0))[0, :3, frame]
            assert (values - line).abs().max() < 0.01
            assert drawn.shape == values.shape
        condition = torch.zeros(1, len(values) + 1, 16, *values.shape[1:])
        condition[0, :-1, frame], condition[0, -1, frame] = values, 1
    fresh = replace(conditioning, rng_state=torch.Generator().manual_seed(1).get_state())
    served = animatediff.Denoise(config).sample(fresh).values
    with torch.no_grad():
        task.clips([SCENE.caption], getattr(task.net, kind) if kind else None, condition)
    trained = latents[0].unflatten(0, (1, 16)).transpose(1, 2)
    assert served.std() > 0.1
    assert (served - trained).abs().max() < 1e-3 * served.abs().max()


def test_a_puppet_in_training_is_the_served_puppet(tmp_path: Path):
    torch.manual_seed(0)
    vae, encoder, nets = live(new_temporal_vae()), live(new_image_encoder()), live(PuppetNets())
    config = ControlNeXtConfig(weights=write_controlnext(tmp_path / "controlnext", vae, encoder, nets), threads=1)
    task = PuppetTask(None, lambda _: (image, embedding), lambda latents: latents, net=in_half_precision(nets))
    poses = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 256, 256), dtype=np.uint8))
    image, embedding = torch.randn(1, CHANNELS, 16, 16), torch.randn(1, 32)
    with torch.no_grad():
        trained = task.sample(torch.zeros(3, 256, 256), poses.float() / 255)
    conditioning = ControlNeXtConditioning(
        seed=0,
        num_inference_steps=4,
        guidance_scale=1.0,
        rng_state=torch.Generator().manual_seed(0).get_state(),
        notes=(),
        poses=poses,
        image_embedding=embedding,
        image_latent=image[0] / 0.18215,
        added_ids=(6.0, 127.0, 0.02),
        batch_frames=8,
        overlap=2,
        controlnext_cond_scale=1.0,
        decode_chunk_size=2,
        fps=7,
    )
    served = controlnext.Denoise(config).sample(conditioning).values[0].transpose(0, 1)
    assert served.std() > 0.1
    assert (served - trained).abs().max() < 1e-3 * served.abs().max()
    assert load_vae(config, torch.float32).config.scaling_factor == 0.18215


def png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
