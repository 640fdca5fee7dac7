"""Chooses whose movements drive the output in a video of several people: one path through the frames, from person to person.

The published code draws everybody and fits the alignment to frames that show exactly one person, so a passer-by becomes a second
skeleton on the reference's body, and a couple that is always seen together cannot be used at all.
"""

from collections.abc import Sequence

import numpy as np

from engines.controlnext.pose.skeleton import Floats, Pose

UNSEEN_COST = 2.0
"""Cost of a person without two visible points: as one of another size by a factor of seven."""


def alone(poses: Sequence[Pose], reference: Pose, reference_size: tuple[int, int], frame_size: tuple[int, int]) -> list[Pose]:
    """Each frame's pose with one person only: the path of the least sum of two costs over all frames.

        size        |log(size / size of the reference's first person)|, over the body points that both show
        continuity  distance between the persons of consecutive frames, in sizes of the reference's first person

    Sizes are fractions of the height of the image or frame. reference_size, frame_size: (height, width) in pixels.
    """
    own = reference.body[0] * (reference_size[1] / reference_size[0], 1.0)
    costs, back, before = np.zeros(1), list[np.ndarray](), np.full((1, 2), np.nan)
    for pose in poses:
        bodies = pose.body * (frame_size[1] / frame_size[0], 1.0)
        shared = pose.visible & reference.visible[0]  # (P, 18)
        sizes = [(_size(body[seen]), _size(own[seen])) for body, seen in zip(bodies, shared, strict=True)]
        size = np.array([abs(np.log(here / there)) if here > 0 and there > 0 else UNSEEN_COST for here, there in sizes])
        centres = np.array(
            [
                np.median(body[seen], axis=0) if seen.any() else (np.nan, np.nan)
                for body, seen in zip(bodies, pose.visible, strict=True)
            ]
        )
        moved = np.linalg.norm(centres[:, None] - before, axis=2) / (_size(own[reference.visible[0]]) or 1.0)  # (P, P before)
        paths = costs + np.nan_to_num(moved)  # nothing is known of somebody unseen
        back.append(paths.argmin(axis=1))
        costs, before = paths.min(axis=1) + size, centres
    chosen = int(costs.argmin())
    only = []
    for pose, origins in zip(reversed(poses), reversed(back), strict=True):
        only.append(pose.person(chosen))
        chosen = int(origins[chosen])
    return only[::-1]


def _size(points: Floats) -> float:
    """The diagonal of the box around points (K, 2); 0 without points."""
    return float(np.linalg.norm(np.ptp(points, axis=0))) if len(points) else 0.0
