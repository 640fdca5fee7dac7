"""Floating-point operations of both models at full size, ours against diffusers': counted, not timed.

The published configurations are built on the meta device, so there are neither weights nor results. torch's FlopCounterMode
adds up matrix products, convolutions and attentions as they are called; it counts no norms, activations and resizes on either
side. Ours are the modules of `engines`, called as the denoising loops call them; results that the loops keep are counted once.
Theirs are diffusers' modules, called as its pipelines call them, and the published ControlNeXt code, whose control net runs in
both guidance halves of every window. Counts are exact: one run is enough, on any machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    SparseControlNetModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from engines.animatediff import published as animatediff_sizes
from engines.animatediff.nets.sparse_control import SparseControl
from engines.animatediff.nets.unet import MotionUNet, Residuals
from engines.checkpoints.weights import build
from engines.controlnext import published as controlnext_sizes
from engines.controlnext.nets.control_net import ControlNet
from engines.controlnext.nets.layers import Transformer
from engines.controlnext.nets.unet import Control, SVDUNet
from engines.controlnext.windows import windows
from engines.sampling import lcm_timesteps
from tests.engines.controlnext.reference import ReferenceControlNet
from tests.load.report import Report, table

Shape = torch.Size

CLIP_H: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
}
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
"""The sizes of video-models.md, section 1, from `published`. A test compares the totals with section 4."""

SVD_CALL_TARGET, CONTROLNEXT_TARGET, ANIMATEDIFF_TARGET = 0.965, 0.92, 0.975

CACHE_BYTES, CACHE_BATCH = 20_000_000_000, 8
"""`control_cache_bytes` of cluster/serve_config.gpu.yaml, and the default `control_batch_frames`."""


@dataclass(frozen=True)
class Count:
    """The operations of one part, theirs and ours."""

    name: str
    theirs: int
    ours: int

    @property
    def ratio(self) -> float:
        """Ours divided by theirs; 1 where both are zero."""
        return self.ours / self.theirs if self.theirs else 1.0


@dataclass(frozen=True)
class Job:
    """A whole job and its parts, with the operations of one UNet call."""

    name: str
    call: Count
    parts: tuple[Count, ...]

    @property
    def whole(self) -> Count:
        """The sum of the parts."""
        return Count(self.name, sum(p.theirs for p in self.parts), sum(p.ours for p in self.parts))


def of_attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Operations of `reelray::attention`: two matrix products."""
    batch, queries, heads, head_dim = query
    return 4 * batch * heads * queries * key[1] * head_dim


def of_temporal_attention(qkv: Shape, num_frames: int, *_: Any, **__: Any) -> int:
    """Operations of `reelray::temporal_attention`: each of B F S tokens attends to F tokens, in all heads together."""
    images, positions, width = qkv
    return 4 * images * positions * num_frames * width // 3


def of_addmm_in_place(_: Shape, left: Shape, right: Shape, *__: Any, **___: Any) -> int:
    """Operations of `aten::addmm_`, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def flops(call: Callable[[], object]) -> int:
    """How many operations `call` executes; a multiplication and an addition are two."""
    known = {torch.ops.reelray.attention: of_attention, torch.ops.reelray.temporal_attention: of_temporal_attention}
    known |= {torch.ops.aten.addmm_: of_addmm_in_place}
    # not inference_mode: there a linear layer is one operation that the counter does not know
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    return counter.get_total_flops()


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A net without storage. `build` alone would not do it for blend factors, whose constructor takes no device."""
    return build(make).to("meta")


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@dataclass(frozen=True)
class ControlNeXtShape:
    """The API's defaults. height, width: in pixels."""

    num_frames: int = 240
    batch_frames: int = 24
    overlap: int = 6
    steps: int = 25
    height: int = 1024
    width: int = 576
    chunk: int = 2


def controlnext(cache_bytes: int = CACHE_BYTES, shape: ControlNeXtShape = ControlNeXtShape()) -> Job:
    """A job at guidance 3 in half precision. cache_bytes: as `ControlNeXtConfig.control_cache_bytes`."""
    frames, height, width = shape.batch_frames, shape.height // 8, shape.width // 8
    calls = len(windows(shape.num_frames, frames, shape.overlap)) * shape.steps
    stock: Any = on_meta(lambda: UNetSpatioTemporalConditionModel(**controlnext_sizes.UNET))
    theirs = flops(lambda: stock(meta(2, frames, 8, height, width), meta(), meta(2, 1, 1024), meta(2, 3), return_dict=False)[0])
    with_known_blend(stock)
    unet = SVDUNet(stock)
    image, embedding = meta(4, height, width), meta(1, 1024)
    half, (time,) = unet.guidance_half(image, embedding), unet.time_biases([0.7], (6.0, 127.0, 0.02))
    for module in unet.modules():
        if isinstance(module, Transformer):
            module.positions(frames)  # which it keeps
    control = Control(meta(frames, 320, height // 2, width // 2), 1.0)
    ours = flops(
        lambda: (unet(meta(frames, 4, height, width), half, time, control), unet(meta(frames, 4, height, width), half, time))
    )
    position_mlps: list[Any] = [module.position_mlp for module in unet.modules() if hasattr(module, "position_mlp")]
    once = flops(
        lambda: (
            *(unet.guidance_half(image, embedding) for _ in range(2)),
            unet.time_biases([0.7] * shape.steps, (6.0, 127.0, 0.02)),
            [mlp(meta(frames, mlp.linear_1.in_features)) for mlp in position_mlps],
        )
    )
    call = Count("one window in both halves", theirs, ours)
    return Job(
        f"ControlNeXt, {shape.num_frames} frames, {shape.width}x{shape.height}, {shape.steps} steps",
        call,
        (
            Count(f"UNet, {calls} windows in both halves", calls * theirs, calls * ours + once),
            _control_net(cache_bytes, calls, shape),
            *_controlnext_ends(shape),
        ),
    )


def _control_net(cache_bytes: int, calls: int, shape: ControlNeXtShape) -> Count:
    direct: Any = build(ReferenceControlNet)
    per_frame = flops(lambda: direct(meta(1, 3, shape.height, shape.width), torch.tensor(0.7)))
    net: Any = build(ControlNet)
    prefix = net.prefix(meta(1, 3, shape.height, shape.width))
    before = flops(lambda: net.prefix(meta(1, 3, shape.height, shape.width)))
    time = net.time_embeddings([0.7])
    size = (shape.height // 16, shape.width // 16)
    after = flops(lambda: net.finish(prefix, time, size))
    batch_bytes = prefix.size_bytes // 2 * CACHE_BATCH  # meta tensors are fp32; half precision is half
    kept = min(shape.num_frames, cache_bytes // batch_bytes * CACHE_BATCH)
    prefixes = kept + (shape.num_frames - kept) * shape.steps
    ours = prefixes * before + shape.num_frames * shape.steps * after + flops(lambda: net.time_embeddings([0.7] * shape.steps))
    return Count("control net", 2 * calls * shape.batch_frames * per_frame, ours)


def _controlnext_ends(shape: ControlNeXtShape) -> tuple[Count, ...]:
    """The parts that are equal on both sides. DWPose runs in ONNX Runtime and is not counted."""
    vae: Any = on_meta(lambda: AutoencoderKLTemporalDecoder(**controlnext_sizes.VAE))
    chunk = meta(shape.chunk, 4, shape.height // 8, shape.width // 8)
    decode = shape.num_frames // shape.chunk * flops(lambda: vae.decode(chunk, num_frames=shape.chunk).sample)
    encode = flops(lambda: vae.encode(meta(1, 3, shape.height, shape.width)).latent_dist.mean)
    clip: Any = build(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_H)))
    image = flops(lambda: clip(meta(1, 3, 224, 224)).image_embeds)
    return Count("VAE decode", decode, decode), Count("VAE encode, CLIP", encode + image, encode + image)


def animatediff(keyframes: int = 3, steps: int = 4, num_frames: int = 16, size: int = 512) -> Job:
    """A job with scribbles at guidance 1, without cached results of an earlier job. size: in pixels."""
    side = size // 8
    text, repeated = meta(1, 77, 768), meta(num_frames, 77, 768)
    latents = meta(1, 4, num_frames, side, side)
    stock: Any = build(lambda: UNetMotionModel(**animatediff_sizes.UNET))
    stock_control: Any = build(lambda: SparseControlNetModel(**animatediff_sizes.SPARSE_CONTROL))
    shown = meta(1, 3, num_frames, size, size), meta(1, 1, num_frames, size, size)

    residuals: list[Any] = []

    def control_call() -> None:
        residuals.extend(
            stock_control(latents, meta(), repeated, controlnet_cond=shown[0], conditioning_mask=shown[1], return_dict=False)
        )

    their_control = flops(control_call)
    skips, mid = tuple(residuals[0]), residuals[1]
    theirs = flops(
        lambda: stock(
            *(latents, meta(), repeated),
            down_block_additional_residuals=skips,
            mid_block_additional_residual=mid,
            return_dict=False,
        )
    )
    unet, net = MotionUNet(stock), SparseControl(stock_control)
    context, time = unet.text_context(text), unet.time_embeddings((999,))
    ours = flops(lambda: unet(latents, time, context, Residuals(skips, mid)))
    timesteps = lcm_timesteps(steps, 1000)
    once = flops(lambda: (unet.text_context(text), unet.time_embeddings(timesteps)))

    def our_control_call() -> object:
        columns = net.columns(meta(keyframes, 3, size, size))
        frames = [i * num_frames // keyframes for i in range(keyframes)]
        return net(columns, frames, num_frames, timesteps, net.text_context(text))

    vae: Any = build(lambda: AutoencoderKL(**animatediff_sizes.VAE))
    decode = num_frames * flops(lambda: vae.decode(meta(1, 4, side, side)).sample)
    clip: Any = build(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)))
    words = flops(lambda: clip(torch.zeros(1, 77, dtype=torch.long, device="meta")).last_hidden_state)
    return Job(
        f"AnimateDiff, {num_frames} frames, {size}x{size}, {steps} steps, {keyframes} scribbles",
        Count("one step", theirs, ours),
        (
            Count(f"UNet, {steps} steps", steps * theirs, steps * ours + once),
            Count("SparseCtrl", steps * their_control, flops(our_control_call)),
            Count("VAE decode", decode, decode),
            Count("CLIP", words, words),
        ),
    )


def with_known_blend(unet: nn.Module) -> None:
    """Gives a net without storage its blend factors, whose values our module reads when it takes over the weights."""
    for module in unet.modules():
        if hasattr(module, "mix_factor"):
            module.mix_factor = nn.Parameter(torch.zeros(1), requires_grad=False)


def main() -> None:
    report = Report("flops", "Floating-point operations at full size, ours against diffusers'", __doc__)
    jobs = (
        (controlnext(), SVD_CALL_TARGET, CONTROLNEXT_TARGET),
        (animatediff(), None, ANIMATEDIFF_TARGET),
    )
    for job, call_target, job_target in jobs:
        shown = table(job.name, "what", "diffusers TFLOP", "ours TFLOP", "ratio", "target")
        for count, target in ((job.call, call_target), *((part, None) for part in job.parts), (job.whole, job_target)):
            name = "the whole job" if count.name == job.name else count.name
            figures = f"{count.theirs / 1e12:,.3f}", f"{count.ours / 1e12:,.3f}", f"{count.ratio:.4f}"
            shown.add_row(name, *figures, "" if target is None else f"<= {target}")
        report.add(shown)
    small = controlnext(cache_bytes=2_000_000_000).whole
    report.add(
        f"The ControlNeXt job with the GPU settings' {CACHE_BYTES / 1e9:.0f} GB for the control net's part that is the same at "
        f"every step; with the default of 2 GB its ratio is {small.ratio:.4f}."
    )
    report.save()


if __name__ == "__main__":
    main()
