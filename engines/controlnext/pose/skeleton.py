"""The people of one frame as points with scores, and how OpenPose numbers, joins and colours them. NumPy only."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BODY_POINTS, HAND_POINTS, FACE_POINTS = 18, 21, 68

VISIBLE = 0.3
"""A body point whose score is not above this is absent (video-models.md, section 2B.3)."""

ALIGNED = (0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
"""K: the body points that tell a person's size and place; elbows (3, 6) and wrists (4, 7) swing too much (section 2B.4)."""

LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),  # arms
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),  # legs
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),  # head
)
"""Pairs of body points from 0, in the order in which they are drawn (section 2B.5 counts from 1)."""

RAINBOW = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
    *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
    *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
"""Colour i is joint i's, and the first 17 are the limbs', before the channels are reversed (section 2B.5)."""

HAND_BONES = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, HAND_POINTS))
"""From the wrist (0) along each of five fingers of four joints."""


@dataclass(frozen=True, eq=False)
class Pose:
    """P >= 0 people, best detection first; every number is finite.

    body: (P, 18, 2), float64, x and y as fractions of the image's width and height: 0 nose, 1 neck, 2-4 right arm,
    5-7 left arm, 8-10 right leg, 11-13 left leg, 14-17 right eye, left eye, right ear, left ear. hands: (P, 2, 21, 2), left
    then right. face: (P, 68, 2). body_scores: (P, 18), hand_scores: (P, 2, 21), face_scores: (P, 68): about 0 to 1, may
    exceed 1; a body point is present above `VISIBLE`. Points lie outside 0 to 1 where a limb leaves the image.
    """

    body: Floats
    body_scores: Floats
    hands: Floats
    hand_scores: Floats
    face: Floats
    face_scores: Floats

    def __post_init__(self) -> None:
        for points, scores, shape in (
            (self.body, self.body_scores, (BODY_POINTS,)),
            (self.hands, self.hand_scores, (2, HAND_POINTS)),
            (self.face, self.face_scores, (FACE_POINTS,)),
        ):
            assert scores.shape == (self.persons, *shape)
            assert points.shape == (*scores.shape, 2)
            assert np.isfinite(points).all()
            assert np.isfinite(scores).all()

    @property
    def persons(self) -> int:
        """P, the number of people."""
        return len(self.body)

    @property
    def visible(self) -> NDArray[np.bool_]:
        """(P, 18): which body points are present."""
        return self.body_scores > VISIBLE

    def person(self, i: int) -> "Pose":
        """The i-th person alone."""
        return Pose(*(getattr(self, field.name)[i : i + 1] for field in fields(self)))
