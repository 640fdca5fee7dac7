"""Hand-made poses."""

import numpy as np

from engines.controlnext.pose.skeleton import Pose

STANDING = np.array(
    [
        *((0.50, 0.10), (0.50, 0.20), (0.42, 0.20), (0.36, 0.35), (0.33, 0.48), (0.58, 0.20), (0.64, 0.35), (0.67, 0.48)),
        *((0.45, 0.50), (0.44, 0.70), (0.44, 0.90), (0.55, 0.50), (0.56, 0.70), (0.56, 0.90)),
        *((0.48, 0.08), (0.52, 0.08), (0.45, 0.10), (0.55, 0.10)),
    ]
)
"""(18, 2)"""


def person(body: np.ndarray = STANDING, score: float = 1.0, rng: np.random.Generator | None = None) -> Pose:
    """One person with these body points, all of `score`, without hands and face. `rng` makes all points and scores random."""
    if rng is None:
        hands, face = np.zeros((1, 2, 21, 2)), np.zeros((1, 68, 2))
        return Pose(body[None], np.full((1, 18), score), hands, np.zeros((1, 2, 21)), face, np.zeros((1, 68)))
    return Pose(
        body=body[None] + rng.normal(0, 0.02, (1, 18, 2)),
        body_scores=score * rng.uniform(0, 1, (1, 18)),
        hands=body[[7, 4]][None, :, None] + rng.normal(0, 0.03, (1, 2, 21, 2)),
        hand_scores=score * rng.uniform(0, 1, (1, 2, 21)),
        face=body[0] + rng.normal(0, 0.03, (1, 68, 2)),
        face_scores=score * rng.uniform(0, 1, (1, 68)),
    )


def together(*poses: Pose) -> Pose:
    """All people in one frame."""
    fields = ("body", "body_scores", "hands", "hand_scores", "face", "face_scores")
    return Pose(*(np.concatenate([getattr(pose, field) for pose in poses]) for field in fields))


def nobody() -> Pose:
    one = person()
    return Pose(one.body[:0], one.body_scores[:0], one.hands[:0], one.hand_scores[:0], one.face[:0], one.face_scores[:0])
