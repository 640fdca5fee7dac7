"""Random puppets in random stances, and the pose pictures that the served model would draw of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.controlnext.demo_pose import JOINTS, Colour, Floats, Puppet, Stance, joints_of, picture_of
from engines.controlnext.pose.draw import draw
from engines.controlnext.pose.keypoints import POINTS, to_pose

SIDE = 256
"""Pixels, the least that the API takes."""

_LEVELS = (64, 192)  # which no joint's disc has
_COLOURS: tuple[Colour, ...] = tuple((r, g, b) for r in _LEVELS for g in _LEVELS for b in _LEVELS)
_RANGES = {
    "head": (0.135, 0.16),
    "shoulders": (0.12, 0.155),
    "hips": (0.08, 0.105),
    "torso": (0.27, 0.31),
    "arm": (0.3, 0.34),
    "leg": (0.44, 0.49),
    "limb": (0.037, 0.047),
    "size": (0.6, 0.75),
    "floor": (0.7, 0.85),
}
_ABSENT_SHARE = 0.02  # of joints that the pose model is taken to miss


def random_puppet(dice: random.Random) -> Puppet:
    """Colours and proportions at random; no part of the body has the colour of what is behind it."""
    wall, ground = dice.choice(_COLOURS), dice.choice(_COLOURS)
    free = [colour for colour in _COLOURS if colour not in (wall, ground)]
    shirt, trousers, skin = (dice.choice(free) for _ in range(3))
    sizes = {name: dice.uniform(*limits) for name, limits in _RANGES.items()}
    return Puppet(shirt=shirt, trousers=trousers, skin=skin, wall=wall, ground=ground, **sizes)


@dataclass(frozen=True)
class Swing:
    """A value that swings around a middle. speed: in radians a frame."""

    middle: float
    reach: float
    speed: float
    phase: float

    def at(self, frame: float) -> float:
        """Its value at a frame."""
        return self.middle + self.reach * float(np.sin(self.speed * frame + self.phase))


@dataclass(frozen=True)
class Moves:
    """Every angle of a stance swings by itself."""

    swings: tuple[Swing, ...]

    def at(self, frame: float) -> Stance:
        """The stance at a frame."""
        lean, x, y, *limbs = (swing.at(frame) for swing in self.swings)
        (a, b, c, d), (e, f, g, h) = limbs[:4], limbs[4:]
        return Stance(lean, ((a, b), (c, d)), ((e, f), (g, h)), (x, y))


_LIMITS = (
    *((-0.15, 0.15), (-0.06, 0.06), (0.04, 0.13)),  # lean, shift
    *((0.3, 1.9), (0.2, 3.0)) * 2,  # arms
    *((0.0, 0.6), (-0.3, 0.25)) * 2,  # legs
)


def random_moves(dice: random.Random) -> Moves:
    """Swings that stay within what the puppet can do."""
    swings = []
    for low, high in _LIMITS:
        reach = dice.uniform(0, (high - low) / 2)
        swings.append(Swing(dice.uniform(low + reach, high - reach), reach, dice.uniform(0.1, 0.5), dice.uniform(0, 2 * np.pi)))
    return Moves(tuple(swings))


def build_of(puppet: Puppet, dice: random.Random) -> Puppet:
    """The same colours on a slightly different body: a driving person's, after it was aligned with the reference's."""
    ranges = ("shoulders", "hips", "torso", "arm", "leg")
    return replace(puppet, **{name: getattr(puppet, name) * dice.uniform(0.93, 1.07) for name in ranges})


def pictures(puppet: Puppet, joints: Sequence[Floats]) -> Tensor:
    """(F, 3, 256, 256) in [0, 1]."""
    return _as_tensor([picture_of(puppet, points, SIDE, SIDE) for points in joints])


def pose_pictures(joints: Sequence[Floats], dice: random.Random | None = None) -> Tensor:
    """(F, 3, 256, 256) in [0, 1]: the served model's drawings. dice: leaves out a joint now and then."""
    return _as_tensor([pose_picture(points, dice) for points in joints])


def pose_picture(joints: Floats, dice: random.Random | None = None) -> NDArray[np.uint8]:
    """(256, 256, 3), uint8, RGB."""
    points, scores = np.zeros((1, POINTS, 2)), np.zeros((1, POINTS))
    points[0, :JOINTS] = joints
    scores[0, :JOINTS] = [0.97 if dice is None or dice.random() > _ABSENT_SHARE else 0.0 for _ in range(JOINTS)]
    return draw(to_pose(points, scores, SIDE, SIDE), SIDE, SIDE)


def stances(puppet: Puppet, moves: Moves, frames: Sequence[float]) -> list[Floats]:
    """The joints at these frames."""
    return [joints_of(puppet, moves.at(frame), SIDE, SIDE) for frame in frames]


def _as_tensor(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
