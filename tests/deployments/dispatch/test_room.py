import pytest

from deployments.dispatch.room import MOST_HIDDEN, Room
from deployments.stages.protocol import Done


def room_after(
    replicas: int, preprocess_s: float, busy_s: float, decode_s: float, width: int = 1, jobs: int = 20, most: int | None = None
) -> int:
    room = Room(most)
    room.replicas(replicas)
    for _ in range(jobs):
        room.learn("preprocess", Done(None, preprocess_s))
        room.learn("denoise", Done(None, busy_s, busy_s=busy_s, width=width))
        room.learn("decode", Done(None, decode_s))
    return room.jobs


def test_before_anything_is_known_one_job_denoises_one_waits_and_one_is_elsewhere():
    assert Room().jobs == 3
    assert room_after(8, 0, 0, 0, jobs=0) == 10


@pytest.mark.parametrize(
    ("replicas", "preprocess_s", "busy_s", "decode_s", "width", "jobs"),
    [
        (1, 0.2, 1.0, 0.2, 1, 1 + 1 + 1),
        (1, 2.0, 1.0, 1.0, 1, 1 + 1 + 3),
        (8, 0.2, 1.0, 0.2, 1, 8 + 1 + 4),
        (8, 5.0, 60.0, 3.0, 26, 1 + 1 + 2),
        (52, 5.0, 60.0, 3.0, 26, 2 + 1 + 7),
        (4, 100.0, 0.1, 0.0, 1, 4 + 1 + MOST_HIDDEN),
    ],
)
def test_there_is_room_for_what_keeps_the_replicas_busy_and_hides_the_other_stages(
    replicas: int, preprocess_s: float, busy_s: float, decode_s: float, width: int, jobs: int
):
    assert room_after(replicas, preprocess_s, busy_s, decode_s, width) == jobs


def test_the_room_follows_the_replicas_at_once_and_its_bound_holds():
    changes: list[int] = []
    room = Room(5, lambda: changes.append(1))
    room.replicas(0)
    assert room.jobs == 3, "so that the first replica to come finds work"
    room.replicas(3)
    assert room.jobs == 5
    assert len(changes) == 2
    assert room_after(100, 1, 1, 1, most=2) == 2


def test_the_newest_jobs_count_most():
    room = Room()
    for seconds in (100.0, *[1.0] * 30):
        room.learn("denoise", Done(None, seconds, busy_s=seconds))
        room.learn("preprocess", Done(None, 1.0))
    assert room.jobs == 3
