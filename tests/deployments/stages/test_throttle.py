import pytest

from deployments.stages.progress import Estimate, StageProgress
from deployments.stages.protocol import Note
from deployments.stages.throttle import BURST, Throttle
from engines.errors import GenerationFailed
from engines.spec import Progress


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_job_of_four_steps_shows_each_however_fast_it_is():
    told: list[Note] = []
    clock = Clock()
    with Throttle("denoise", told.append, clock) as throttle:
        for done in range(5):
            throttle(Progress("step", done, 4))
            clock.now += 0.01
    assert [note.message.split(",")[0] for note in told] == [f"denoise: step {done}/4" for done in range(5)]


def test_of_much_progress_a_burst_one_a_second_and_the_last_are_told():
    told: list[Note] = []
    clock = Clock()
    with Throttle("preprocess", told.append, clock) as throttle:
        for done in range(1, 241):  # 80 a second
            throttle(Progress("pose", done, 240))
            clock.now += 1 / 80
    done = [note.progress.at.done for note in told if note.progress]
    assert done[:BURST] == list(range(1, BURST + 1))
    assert done[-1] == 240
    assert BURST + 3 <= len(done) <= BURST + 5


def test_what_goes_on_within_a_step_does_not_crowd_out_the_steps():
    told: list[Note] = []
    clock = Clock()
    with Throttle("denoise", told.append, clock) as throttle:
        for step in range(4):
            for window in range(1, 13):  # 4 a second
                clock.now += 0.25
                throttle(Progress("step", step, 4, Progress("window", window, 13)))
            throttle(Progress("step", step + 1, 4))
    levels = [note.progress.at for note in told if note.progress]
    assert [level.done for level in levels if level.within is None] == [1, 2, 3, 4]
    assert len([level for level in levels if level.within]) in range(8, 13), "once a second, in 12"


def test_what_was_told_last_is_told_of_a_stage_that_fails():
    told: list[Note] = []

    def fail() -> None:
        with Throttle("decode", told.append, Clock()) as throttle:
            for done in range(1, 100):
                throttle(Progress("frame", done, 240))
            raise GenerationFailed

    with pytest.raises(GenerationFailed):
        fail()
    assert told[-1].message == "decode: frame 99/240, 0 s left"


def test_a_hundred_thousand_calls_become_a_dozen_notes():
    told: list[Note] = []
    clock = Clock()
    with Throttle("denoise", told.append, clock) as throttle:
        for _ in range(100_000):
            throttle(Progress("step", 4, 4))  # the last step again and again
    assert len(told) == BURST + 1


def test_the_time_left_follows_from_the_pace_so_far():
    clock = Clock()
    estimate = Estimate(clock)
    assert estimate.eta_s(0.0) is None
    clock.now += 10
    assert estimate.eta_s(0.0) is None, "nothing has been done yet"
    assert estimate.eta_s(0.25) == 30
    clock.now += 10
    assert estimate.eta_s(1.0) == 0


def test_the_steps_before_a_checkpoint_are_no_part_of_the_pace():
    clock = Clock()
    estimate = Estimate(clock)
    assert estimate.eta_s(0.5) is None
    clock.now += 10
    assert estimate.eta_s(0.75) == 10


@pytest.mark.parametrize(
    ("at", "eta_s", "message"),
    [
        (Progress("step", 3, 25, Progress("window", 5, 13)), 11.2, "denoise: step 3/25, window 5/13, 12 s left"),
        (Progress("step", 0, 4), None, "denoise: step 0/4"),
        (Progress("step", 4, 4), 0.0, "denoise: step 4/4"),
        (Progress("step", 1, 4), 99.0, "denoise: step 1/4, 99 s left"),
        (Progress("step", 1, 4), 99.5, "denoise: step 1/4, 2 min left"),
        (Progress("step", 1, 4), 6001.0, "denoise: step 1/4, 1 h 41 min left"),
    ],
)
def test_a_person_reads_it(at: Progress, eta_s: float | None, message: str):
    assert StageProgress("denoise", at, eta_s).message == message


def test_a_program_reads_it():
    progress = StageProgress("denoise", Progress("step", 3, 25, Progress("window", 5, 13)), 12.04)
    assert progress.fields() == {
        "stage": "denoise",
        "fraction": 0.1354,
        "eta_s": 12.0,
        "step": {"done": 3, "total": 25},
        "window": {"done": 5, "total": 13},
    }
