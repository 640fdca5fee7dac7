"""Moves and scales the driving poses onto the reference body, by one affine fit over the whole video.

`video-models.md`, section 2B.4. On input that the fit cannot use, the published code fails, or draws a figure upside down
or shrunk to a dot. Here the first case is an error for the caller, and the second becomes a shift without scaling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engines.controlnext.pose.skeleton import ALIGNED, Floats, Pose
from engines.controlnext.spec import IMAGE_FIELD, VIDEO_FIELD
from engines.errors import PersonNotFound

MIN_SPREAD = 1e-4
"""Standard deviation of the points' y, as a fraction of the image, below which it gives no scale: 0.1 pixel in 1024."""

MIN_SCALE = 0.02
"""A smaller factor shrinks a figure as high as the frame to a dot (20 pixels in 1024); a negative one turns it upside down."""


@dataclass(frozen=True)
class Alignment:
    """Maps fractions of the driving frame to fractions of the reference image: x -> scale_x * x + shift_x, y likewise."""

    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float

    def apply(self, pose: Pose) -> Pose:
        """The pose with every person's body, face and hands moved. Scores are unchanged."""
        scale, shift = np.array((self.scale_x, self.scale_y)), np.array((self.shift_x, self.shift_y))
        return replace(pose, body=pose.body * scale + shift, hands=pose.hands * scale + shift, face=pose.face * scale + shift)


def require_person(reference: Pose) -> None:
    """Raises `PersonNotFound` if the reference image's first person shows no point of K. Needs no video."""
    if not reference.persons or not reference.visible[0, list(ALIGNED)].any():
        raise PersonNotFound("No person was found in the reference image.", ("body", IMAGE_FIELD))


def fit(reference: Pose, driving: Sequence[Pose], reference_size: tuple[int, int], frame_size: tuple[int, int]) -> Alignment:
    """The alignment for a video. With K = `ALIGNED` restricted to points visible in the reference's first person:

        y_ref ~ scale_y * y + shift_y            least squares over K of every frame with exactly one person
        scale_x = scale_y * (w / h) * (H / W)    the same in pixels on both axes
        shift_x = mean(x_ref - scale_x * x)

    reference_size: (H, W) of the reference image, frame_size: (h, w) of the video, in pixels. The fit uses points of those
    frames whatever their score, as published. scale_y is 1 where the fit would collapse the figure or turn it upside down: if
    on either side all y are equal within `MIN_SPREAD`, as with a single visible point, or if the scale is below `MIN_SCALE`.
    Raises `PersonNotFound` if the reference shows no point of K, if no driving frame shows exactly one person, or if none of
    those frames shows a visible point of K.
    """
    require_person(reference)
    aligned = list(ALIGNED)
    alone = [pose for pose in driving if pose.persons == 1]
    if not alone:
        raise PersonNotFound("No frame of the driving video shows exactly one person.", ("body", VIDEO_FIELD))
    if not any(pose.visible[0, aligned].any() for pose in alone):
        raise PersonNotFound("No person was found in the driving video.", ("body", VIDEO_FIELD))
    points = [k for k in aligned if reference.visible[0, k]]
    source = np.concatenate([pose.body[0, points] for pose in alone])  # (F*K, 2)
    target = np.tile(reference.body[0, points], (len(alone), 1))  # (F*K, 2)
    (height, width), (frame_height, frame_width) = reference_size, frame_size
    scale_y = _slope(source[:, 1], target[:, 1])
    scale_x = scale_y * (frame_width / frame_height) * (height / width)
    shift_x, shift_y = (target - source * (scale_x, scale_y)).mean(axis=0).tolist()
    return Alignment(scale_x, scale_y, shift_x, shift_y)


def _slope(source: Floats, target: Floats) -> float:
    """The slope of the least-squares line through (source, target), or 1 if it is not usable as a scale."""
    if min(source.std(), target.std()) < MIN_SPREAD:
        return 1.0
    deviation = source - source.mean()
    slope = float(deviation @ (target - target.mean()) / (deviation @ deviation))
    return slope if slope >= MIN_SCALE else 1.0
