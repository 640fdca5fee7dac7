"""What the AnimateDiff demo can draw: 3 shapes x 6 colours x 4 motions x 3 backgrounds, as "a red circle moves right on blue".

A clip is a function of its words: size, speed and where a path lies follow from them, so that the first of four steps can already
draw it. Only a keyframe moves the whole path. Positions lie on a grid, hence a table of latents can hold every frame that there
is. `demo-weights.md` says why each of this makes the problem learnable on two cores.
"""

import random
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

SIDE = 64
FRAMES = 16
STRIDE = 2
"""Pixels a frame."""
CENTRE = 32
"""Of the frame, in both axes; a path passes through it, unless a keyframe moves it."""
AHEAD = 6
"""By how many pixels the middle of a path lies beyond the centre, in its direction: so a single frame tells left from right. If
opposite paths had the same places, a direction would only say in which order they come, which is far harder to learn.
"""

COLOURS = {
    "red": (225, 40, 40),
    "yellow": (245, 225, 50),
    "green": (40, 190, 60),
    "cyan": (60, 215, 230),
    "pink": (240, 80, 215),
    "white": (250, 250, 250),
}
BACKGROUNDS = {"black": (10, 10, 10), "blue": (25, 40, 150), "grey": (115, 115, 115)}
SHAPES = ("circle", "square", "triangle")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Direction in x and y; y grows downwards."""

RADIUS = {"circle": 10.0, "square": 9.0, "triangle": 13.0}
"""Radius, half side, and circumradius in pixels."""

ALONG = tuple(range(-6, 7, 2))
ACROSS = tuple(range(-18, 19, 3))
"""How far from the centre a keyframe may move the middle of a path, in its direction and across it, in pixels."""

_FILLER = (  # words without a meaning
    "the",
    "of",
    "with",
    "and",
    "in",
    "dog",
    "city",
    "night",
    "runs",
    "old",
    "ship",
    "quick",
    "drone",
    "sun",
    "tall",
    "over",
)


@dataclass(frozen=True)
class Scene:
    """One clip. motion: None stands still in the middle.

    along, across: how far the path's middle lies from the centre, in pixels, in its direction and across it. Only a keyframe
    makes them other than here.
    """

    shape: str = "circle"
    colour: str = "white"
    motion: str | None = None
    background: str = "black"
    along: int = AHEAD
    across: int = 0

    @property
    def caption(self) -> str:
        """The sentence that describes it."""
        moves = f" moves {self.motion}" if self.motion else ""
        return f"a {self.colour} {self.shape}{moves} on {self.background}"

    def centre(self, frame: int) -> tuple[int, int]:
        """x and y of the shape's centre, in pixels."""
        if self.motion is None:
            return CENTRE, CENTRE
        dx, dy = MOTIONS[self.motion]
        way = STRIDE * frame - STRIDE * (FRAMES - 1) // 2 + self.along
        return CENTRE + dx * way + abs(dy) * self.across, CENTRE + dy * way + abs(dx) * self.across


PLAIN = Scene()
"""What a prompt draws that names nothing known; a missing word means the word of this scene."""


def all_scenes() -> list[Scene]:
    """The 216 sentences' scenes."""
    return [Scene(*parts) for parts in product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)]


def held_out() -> list[Scene]:
    """24 scenes that training never sees: one for each colour and motion, with shapes and backgrounds evenly spread."""
    return [
        Scene(shape, colour, motion, background)
        for (i, shape), (j, colour), (k, motion), (m, background) in product(
            *(enumerate(kind) for kind in (SHAPES, COLOURS, MOTIONS, BACKGROUNDS))
        )
        if (3 * i + 4 * j + 2 * k + m) % 9 == 0
    ]


@cache
def training_scenes() -> tuple[Scene, ...]:
    """The other 192."""
    kept_back = set(held_out())
    return tuple(scene for scene in all_scenes() if scene not in kept_back)


def loose(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A prompt that says only some of a scene's words, among words without a meaning, and what it should draw."""
    parts = {"colour": scene.colour, "shape": scene.shape, "background": f"on {scene.background}"}
    if scene.motion is not None:
        parts["motion"] = f"moves {scene.motion}"
    said = {field: words for field, words in parts.items() if rng.random() < 0.6}
    filler = rng.choices(_FILLER, k=rng.randrange(4))
    prompt = " ".join(rng.sample(filler, len(filler)) + ["a"] * rng.randrange(2) + list(said.values()))
    return prompt, replace(PLAIN, **{field: getattr(scene, field) for field in said})


def read(prompt: str) -> Scene:
    """The scene that a prompt describes; what it does not say is as in `PLAIN`. The last word of a kind counts."""
    scene = PLAIN
    for word in re.findall(r"[a-z]+", prompt.lower()):
        for field, known in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS), ("background", BACKGROUNDS)):
            if word in known:
                scene = replace(scene, **{field: word})
    return scene


def words() -> list[str]:
    """Every word of the grammar."""
    return ["a", "moves", "on", *SHAPES, *COLOURS, *MOTIONS, *BACKGROUNDS]
