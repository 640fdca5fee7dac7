"""Trains the AnimateDiff demo's nets: first on single images, which are 16 times as cheap, then on clips with keyframes.

v-prediction on a linear schedule; most timesteps are the four that a request of four steps uses. Half of the clips have
keyframes, and SparseCtrl learns together with the UNet. `demo-weights.md`, sections 2 and 4.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from engines.demo.animatediff.draw import scribbles
from engines.demo.animatediff.frame_table import SCALING, FrameTable
from engines.demo.animatediff.grammar import ACROSS, ALONG, FRAMES, SIDE, Scene, held_out, loose, training_scenes
from engines.demo.animatediff.judge import as_frames, judge, overlap, shape_mask, true_mask
from engines.demo.animatediff.nets import ClipNets, ImageNets, token_ids
from engines.demo.sheet import write_sheet
from engines.demo.training import Schedule, device_of
from engines.sampling import LCM_GRID, lcm_step, lcm_timesteps, linear_schedule

Residuals = tuple[list[Tensor], Tensor]

SCHEDULE = linear_schedule(prediction_type="v_prediction")
IMAGE_SCHEDULE = Schedule(1300, 1.5e-3, hold=0.6, average=0.998)
CLIP_SCHEDULE = Schedule(4000, 1.2e-3, hold=0.6, average=0.998)

_SERVED = lcm_timesteps(4)
_GRID = lcm_timesteps(LCM_GRID)
_SERVED_SHARES = (0.5, 0.15, 0.1, 0.05)  # the rest is spread over the grid
_KEYFRAMES = 3
_STEPS = ((16, 0, 0), 4), ((2, 2, 4), FRAMES), ((0, 0, 12), 6)
"""Steps in turn: clips of words alone, with scribbles and with rgb keyframes, and how many frames of each."""
_PART_FIRST = 0.75  # of the clips that are not whole, so many are at the first timestep at least
_LOOSE_SHARE = 0.15  # of the clips without keyframes: prompts with words that are missing or mean nothing


def draw_timesteps(count: int, rng: torch.Generator) -> Tensor:
    """(B,): mostly those of a request of four steps, the first above all, at which only the words tell what to draw."""
    served = torch.tensor(_SERVED)[torch.multinomial(torch.tensor(_SERVED_SHARES), count, replacement=True, generator=rng)]
    grid = torch.tensor(_GRID)[torch.randint(len(_GRID), (count,), generator=rng)]
    return torch.where(torch.rand(count, generator=rng) < sum(_SERVED_SHARES), served, grid)


def noised(clean: Tensor, timesteps: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The noisy latents and the v that the net must give for them. clean: (B, ...).

    At the first timestep they are pure noise, as sampling starts. The schedule would leave 0.04 of the clip in them, enough to
    tell a direction by: a net that reads it there does not learn to read it in the words, and draws half of the clips reversed.
    """
    noise = torch.randn(clean.shape, generator=rng)
    each = (-1, *(1,) * (clean.ndim - 1))
    abar, first = SCHEDULE.alphas_cumprod[timesteps].reshape(each), (timesteps == _SERVED[0]).reshape(each)
    noisy = torch.where(first, noise, abar.sqrt() * clean + (1 - abar).sqrt() * noise)
    return noisy, (abar.sqrt() * noisy - clean) / (1 - abar).sqrt()


def by_noise(error: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
    """The squared error of v, (B, ...), as means at the highest timestep and below it; what the batch lacks is left out."""
    each = error.detach().square().flatten(1).mean(dim=1)
    first = timesteps == _SERVED[0]
    return {name: each[part].mean() for name, part in (("first", first), ("later", ~first)) if part.any()}


@dataclass
class ImageTask:
    """Single frames: half of them of a shape that stands in the middle, which the words alone determine."""

    table: FrameTable
    tokenizer: CLIPTokenizer
    decode: Callable[[Tensor], Tensor]
    name: str = "animatediff-images"
    schedule: Schedule = IMAGE_SCHEDULE
    batch: int = 32
    net: ImageNets = field(init=False)

    def __post_init__(self) -> None:
        self.net = ImageNets(self.tokenizer)

    def losses(self, step: int, rng: torch.Generator) -> Mapping[str, Tensor]:
        """See `Task`."""
        dice = random.Random(int(torch.randint(2**31, (), generator=rng)))
        moving = dice.choices(training_scenes(), k=self.batch)
        scenes = [replace(scene, motion=None) if i % 2 else scene for i, scene in enumerate(moving)]
        clean = self.table.frames(scenes, [dice.randrange(FRAMES) for _ in scenes])
        timesteps = draw_timesteps(len(scenes), rng)
        noisy, target = noised(clean, timesteps, rng)
        noisy, target, timesteps = (values.to(device_of(self.net)) for values in (noisy, target, timesteps))
        error = self.net.unet(noisy, timesteps, self._text([scene.caption for scene in scenes])).sample - target
        return {"loss": error.square().mean(), **by_noise(error, timesteps)}

    def sheet(self, path: Path) -> str:
        """Standing shapes of held-out captions, four steps."""
        scenes = [replace(scene, motion=None) for scene in held_out()]
        text = self._text([scene.caption for scene in scenes])
        shape = (len(scenes), 4, 8, 8)
        pictures = self.decode(sample(shape, lambda x, t: self.net.unet(x, t, text).sample, 1, device_of(self.net)))
        write_sheet(path, pictures.split(8), [" | ".join(s.caption for s in scenes[i : i + 8])[:180] for i in range(0, 24, 8)])
        verdicts = [judge(as_frames(picture[None])).right(scene) for picture, scene in zip(pictures, scenes, strict=True)]
        return score(verdicts, ("background", "colour", "shape"))

    def _text(self, prompts: Sequence[str]) -> Tensor:
        return self.net.text(token_ids(self.tokenizer, prompts).to(device_of(self.net))).last_hidden_state


@dataclass
class ClipTask:
    """Three kinds of steps in turn: whole clips with and without keyframes; four frames, with their true positions, of more clips
    of words alone; and six frames of clips with rgb keyframes. The latter two are mostly at the first timestep, where nothing but
    the words tells a direction, and nothing but the keyframes tells a colour.
    """

    table: FrameTable
    tokenizer: CLIPTokenizer
    decode: Callable[[Tensor], Tensor]
    name: str = "animatediff-clips"
    schedule: Schedule = CLIP_SCHEDULE
    net: ClipNets = field(init=False)

    def __post_init__(self) -> None:
        self.net = ClipNets(self.tokenizer)

    def begin(self, images: ImageNets) -> None:
        """Start from the image stage's nets."""
        dice = random.Random(0)
        scenes = [moved(scene, dice) for scene in dice.choices(training_scenes(), k=64)]
        keys = [[dice.randrange(FRAMES)] for _ in scenes]
        picked = [keys[i][0] for i in range(len(scenes))]
        drawn, latents = scribble_condition(scenes, keys, dice), rgb_condition(self.table, scenes, keys)
        rows = torch.arange(len(scenes))
        self.net.begin(images, drawn[rows, :, picked], latents[rows, :, picked])

    def losses(self, step: int, rng: torch.Generator) -> Mapping[str, Tensor]:
        """See `Task`."""
        dice = random.Random(int(torch.randint(2**31, (), generator=rng)))
        (plain, outlined, painted), frames = _STEPS[step % len(_STEPS)]
        shown = sorted(dice.sample(range(FRAMES), frames))
        worded = [loose(scene, dice) if dice.random() < _LOOSE_SHARE else (scene.caption, scene) for scene in _some(plain, dice)]
        keyed = [moved(scene, dice) for scene in _some(outlined + painted, dice)]
        drawn, coloured = keyed[:outlined], keyed[outlined:]
        prompts = [prompt for prompt, _ in worded]
        prompts += [scribble_prompt(scene, dice) for scene in drawn] + [rgb_prompt(scene, dice) for scene in coloured]
        scenes = [*(scene for _, scene in worded), *keyed]
        timesteps = draw_timesteps(len(scenes), rng)
        if frames < FRAMES:
            timesteps[torch.rand(len(scenes), generator=rng) < _PART_FIRST] = _SERVED[0]
        noisy, target = noised(self.table.clips(scenes)[:, :, shown], timesteps, rng)
        noisy, target, timesteps = (values.to(device_of(self.net)) for values in (noisy, target, timesteps))
        conditions = []
        if drawn:
            lines = scribble_condition(drawn, _keys(drawn, shown, dice), dice)
            conditions.append((self.net.scribble, lines[:, :, shown]))
        if coloured:
            pictures = rgb_condition(self.table, coloured, _keys(coloured, shown, dice))
            conditions.append((self.net.rgb, pictures[:, :, shown]))
        self.net.shown = shown
        error = self._predict(noisy, timesteps, self._text(prompts), conditions) - target
        self.net.shown = None
        return {
            "loss": error.square().mean(),
            **{f"plain_{key}": value for key, value in by_noise(error[:plain], timesteps[:plain]).items()},
            **{f"keyed_{key}": value for key, value in by_noise(error[plain:], timesteps[plain:]).items()},
        }

    def sheet(self, path: Path) -> str:
        """Clips of held-out captions without keyframes, then with a scribble, then with an rgb keyframe; four steps."""
        dice = random.Random(2)
        scenes = dice.sample(held_out(), 12)
        placed = [replace(scene, across=dice.choice((-18, -15, 15, 18))) for scene in scenes[:6]]
        keys = [[dice.choice((0, 4, 8, 12, 15))] for _ in placed]
        plain = self.clips([scene.caption for scene in scenes])
        scribbled = self.clips([s.caption for s in placed], self.net.scribble, scribble_condition(placed, keys, dice))
        wordless = [f"a {scene.shape} moves {scene.motion}" for scene in placed]
        coloured = self.clips(wordless, self.net.rgb, rgb_condition(self.table, placed, keys))
        captions = [s.caption for s in scenes[:6]] + [f"scribble at {k}: {s.caption}" for s, k in zip(placed, keys, strict=True)]
        captions += [f"rgb at {k}: {words} ({s.caption})" for s, k, words in zip(placed, keys, wordless, strict=True)]
        write_sheet(path, [*plain[:6], *scribbled, *coloured], captions)
        kinds = ("background", "colour", "motion", "shape")
        lines = [f"words: {score([judge(as_frames(c)).right(s) for c, s in zip(plain, scenes, strict=True)], kinds)}"]
        for name, clips in (("scribble", scribbled), ("rgb", coloured)):
            there = [
                overlap(shape_mask(as_frames(clip)[key[0]]), true_mask(scene, scene.centre(key[0])))
                for clip, scene, key in zip(clips, placed, keys, strict=True)
            ]
            right = score([judge(as_frames(c)).right(s) for c, s in zip(clips, placed, strict=True)], kinds)
            lines.append(f"{name}: IoU {sum(there) / len(there):.2f}, {right}")
        return "; ".join(lines)

    def clips(self, prompts: Sequence[str], control: Any = None, condition: Tensor | None = None, steps: int = 4) -> Tensor:
        """(B, 16, 3, 64, 64) in [0, 1]: sampled as the served model does it."""
        text, conditions = self._text(prompts), () if condition is None else ((control, condition),)
        shape = (len(prompts), 4, FRAMES, 8, 8)
        latents = sample(shape, lambda x, t: self._predict(x, t, text, conditions), 1, device_of(self.net), steps)
        return self.decode(latents.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, FRAMES))

    def _text(self, prompts: Sequence[str]) -> Tensor:
        return self.net.text(token_ids(self.tokenizer, prompts).to(device_of(self.net))).last_hidden_state

    def _predict(self, x: Tensor, timesteps: Tensor, text: Tensor, conditions: Sequence[tuple[Any, Tensor]]) -> Tensor:
        """The UNet's v. conditions: nets and keyframes of the last clips; those before have none."""
        parts: list[Residuals] = []
        start = free = len(x) - sum(len(condition) for _, condition in conditions)
        for control, condition in conditions:
            part = slice(start, start := start + len(condition))
            frames, mask = condition[:, :-1].to(x.device), condition[:, -1:].to(x.device)
            parts.append(control(x[part], timesteps[part], text[part], frames, conditioning_mask=mask, return_dict=False))
        if not parts:
            return self.net.unet(x, timesteps, text).sample
        *skips, mid = (
            torch.cat([levels[0].new_zeros(free * x.shape[2], *levels[0].shape[1:]), *levels])
            for levels in zip(*((*skips, mid) for skips, mid in parts), strict=True)
        )
        controls = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": mid}
        return self.net.unet(x, timesteps, text, **controls).sample


def moved(scene: Scene, dice: random.Random) -> Scene:
    """The scene on another path."""
    return replace(scene, along=dice.choice(ALONG), across=dice.choice(ACROSS))


def scribble_prompt(scene: Scene, dice: random.Random) -> str:
    """Now and then without the shape, which the scribble shows."""
    return scene.caption.replace(scene.shape, "shape") if dice.random() < 0.15 else scene.caption


def rgb_prompt(scene: Scene, dice: random.Random) -> str:
    """Mostly without colour and background, which the keyframe shows."""
    return f"a {scene.shape} moves {scene.motion}" if dice.random() < 0.75 else scene.caption


def scribble_condition(scenes: Sequence[Scene], keys: Sequence[Sequence[int]], dice: random.Random) -> Tensor:
    """(B, 4, 16, 64, 64): outlines at the frames `keys`, and the mask."""
    condition = torch.zeros(len(scenes), 4, FRAMES, SIDE, SIDE)
    for values, scene, frames in zip(condition, scenes, keys, strict=True):
        outlines = scribbles([scene] * len(frames), [scene.centre(i) for i in frames], [dice.uniform(1, 2.5) for _ in frames])
        values[:3, list(frames)] = outlines.transpose(0, 1)
        values[3, list(frames)] = 1
    return condition


def rgb_condition(table: FrameTable, scenes: Sequence[Scene], keys: Sequence[Sequence[int]]) -> Tensor:
    """(B, 5, 16, 8, 8): keyframes' latents at the frames `keys`, and the mask."""
    condition = torch.zeros(len(scenes), 5, FRAMES, SIDE // 8, SIDE // 8)
    for values, scene, frames in zip(condition, scenes, keys, strict=True):
        values[:4, list(frames)] = table.frames([scene] * len(frames), frames).transpose(0, 1)
        values[4, list(frames)] = 1
    return condition


def sample(
    shape: tuple[int, ...], predict: Callable[[Tensor, Tensor], Tensor], seed: int, device: torch.device, steps: int = 4
) -> Tensor:
    """LCM's steps without guidance."""
    generator = torch.Generator().manual_seed(seed)
    x, timesteps = torch.randn(shape, generator=generator).to(device), lcm_timesteps(steps)
    for t, t_next in zip(timesteps, (*timesteps[1:], None), strict=True):
        noise = None if t_next is None else torch.randn(shape, generator=generator).to(device)
        x = lcm_step(SCHEDULE, x, predict(x, torch.full(shape[:1], t, device=device)), t, t_next, noise)
    return x


def decoder(vae: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """Latents (N, 4, 8, 8) of unit variance to frames in [0, 1], on the CPU. The VAE follows them to their device."""
    return lambda latents: (vae.to(latents.device).decode(latents / SCALING).sample / 2 + 0.5).clamp(0, 1).cpu()


def score(verdicts: Sequence[Mapping[str, bool]], kinds: Sequence[str]) -> str:
    """Percent right by kind."""
    return " ".join(f"{kind} {100 * sum(v[kind] for v in verdicts) / len(verdicts):.0f}" for kind in kinds)


def _some(count: int, dice: random.Random) -> list[Scene]:
    return dice.choices(training_scenes(), k=count)


def _keys(scenes: Sequence[Scene], shown: Sequence[int], dice: random.Random) -> list[list[int]]:
    return [sorted(dice.sample(shown, dice.randint(1, _KEYFRAMES))) for _ in scenes]
