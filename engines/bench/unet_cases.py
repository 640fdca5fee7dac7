"""One call of each UNet at the published sizes: a step of AnimateDiff under SparseCtrl, a controlled window of SVD.

What each side computes once a request (ours: text keys and values, biases) is computed before the timing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engines.animatediff.call import motion_call, motion_inputs
from engines.animatediff.nets.unet import Residuals
from engines.backends.cuda_graph import GraphEngine
from engines.backends.exact_shapes import ExactShapes
from engines.backends.inductor import InductorEngine
from engines.backends.shapes import Shape
from engines.backends.unet_call import UNetCall
from engines.bench.measure import Case, Way
from engines.bench.nets import AnimateDiffNets, ControlNeXtNets
from engines.bench.options import Options
from engines.controlnext.call import svd_call, svd_inputs
from engines.controlnext.nets.unet import Control
from kernels.choice import forced

TIMESTEP, TIME, ADDED_IDS = 499, 0.7, (6.0, 127.0, 0.02)
"""AnimateDiff's timestep. SVD's time, 0.25 ln sigma, and its added ids (fps, motion bucket, noise strength)."""


SLOW = frozenset({"ours, inductor", "diffusers, compiled"})
"""Ways that take minutes to prepare."""


def animatediff_cases(nets: AnimateDiffNets, options: Options) -> Iterator[Case]:
    """A step at guidance 1, and one with guidance as a batch of two clips."""
    for halves in (1, 2):
        yield _motion_case(nets, halves, options)


def _motion_case(nets: AnimateDiffNets, halves: int, options: Options) -> Case:
    size, unet = nets.size, nets.unet
    call = motion_call(unet, halves)
    shape = Shape(size.frames, size.side, size.side)
    like = unet.conv_in.weight
    normal = partial(torch.randn, device=like.device, dtype=like.dtype)
    sizes = call.shapes(shape)
    skips = [normal(s) for name, s in sizes.items() if name.startswith("skip")]
    latents, text, mid = normal(sizes["latents"]), normal(halves, 77, size.text_width), normal(sizes["mid"])
    with torch.inference_mode():
        context, time = unet.text_context(text), unet.time_embeddings((TIMESTEP,))
    images = [t.contiguous(memory_format=torch.channels_last) for t in (*skips, mid)]  # the layout of our SparseCtrl's output
    residuals = Residuals(tuple(images[:-1]), images[-1])
    repeated = text.repeat_interleave(size.frames, dim=0)
    timestep = torch.tensor(TIMESTEP, device=like.device)
    given = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": mid, "return_dict": False}

    def theirs(net: Any) -> Way:
        return lambda: net(latents, timestep, repeated, **given)[0]

    def ours() -> Way:
        return lambda: unet(latents, time, context, residuals)

    def prepared(engine: ExactShapes) -> Way:
        engine.prepare(shape)
        return lambda: engine(motion_inputs(latents, time, context, residuals))

    title = f"UNet step, {8 * size.side}x{8 * size.side}, {size.frames} frames, guidance in {halves}, SparseCtrl"
    return unet_case("animatediff", title, nets.their_unet, theirs, ours, call, prepared, options)


def controlnext_cases(nets: ControlNeXtNets, options: Options) -> Iterator[Case]:
    """One window in the conditional half of guidance."""
    size, unet = nets.size, nets.unet
    call = svd_call(unet)
    shape = Shape(size.window, size.height, size.width)
    like = unet.conv_in.weight
    normal = partial(torch.randn, device=like.device, dtype=like.dtype)
    latents, maps = (normal(call.shapes(shape)[name]) for name in ("latents", "control"))
    maps = maps.contiguous(memory_format=torch.channels_last)
    image, embedding = normal(unet.latent_channels, size.height, size.width), normal(1, size.image_width)
    with torch.inference_mode():
        half, (time,) = unet.guidance_half(image, embedding), unet.time_biases([TIME], ADDED_IDS)
    control = Control(maps, 1.0)
    batch = torch.cat([latents, image.expand_as(latents)], dim=1)[None]  # (1, F, 8, h, w)
    timestep, ids = torch.tensor(TIME, device=like.device), torch.tensor([ADDED_IDS], device=like.device)

    def theirs(net: Any) -> Way:
        def call_net() -> Tensor:
            nets.injected["control"] = control
            output: Tensor = net(batch, timestep, embedding[None], ids, return_dict=False)[0]
            return output[0]

        return call_net

    def ours() -> Way:
        return lambda: unet(latents, half, time, control)

    def prepared(engine: ExactShapes) -> Way:
        engine.prepare(shape)
        return lambda: engine(svd_inputs(latents, half, time, control))

    title = f"UNet call, {8 * size.width}x{8 * size.height}, {size.window} frames, one half, controlled"
    yield unet_case("controlnext", title, nets.their_unet, theirs, ours, call, prepared, options)


def unet_case(
    model: str,
    title: str,
    their_unet: Any,
    theirs: Callable[[Any], Way],
    ours: Callable[[], Way],
    call: UNetCall,
    prepared: Callable[[ExactShapes], Way],
    options: Options,
) -> Case:
    """theirs: makes the way of diffusers' UNet, plain or compiled. prepared: makes the way of an engine of `call`."""
    ways: dict[str, Callable[[], Way]] = {"diffusers": lambda: theirs(their_unet), "ours": ours}
    ways["ours, every kernel"] = lambda: by_kernels(ours())
    ways |= engine_ways(call, prepared, options)
    if options.compile_theirs:
        mode = "max-autotune-no-cudagraphs" if options.autotune else "default"
        ways["diffusers, compiled"] = lambda: run_once(theirs(torch.compile(their_unet, mode=mode, dynamic=False)))
    return Case(model, title, ways, options.unet_rounds, SLOW, profiled=True)


def engine_ways(call: UNetCall, prepared: Callable[[ExactShapes], Way], options: Options) -> dict[str, Callable[[], Way]]:
    """The ways of the requested engines. Each engine is built only when its way is prepared."""
    ways: dict[str, Callable[[], Way]] = {}
    if options.graph:
        ways["ours, CUDA graph"] = lambda: prepared(GraphEngine(call))
    if options.inductor:
        ways["ours, inductor"] = lambda: prepared(InductorEngine(call, autotune=options.autotune))
    return ways


def by_kernels(way: Way) -> Way:
    """The way with our kernels at every site. Without this, they run only where the record has them faster."""

    def run() -> Tensor:
        with forced("kernels"):
            return way()

    return run


def run_once(way: Way) -> Way:
    """The way, after a first run in which `torch.compile` compiles it."""
    way()
    return way
