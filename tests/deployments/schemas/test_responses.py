"""What responses assume about `jobs`, which they do not import."""

import pytest

from deployments.jobs.job import JobState
from deployments.schemas.responses import STATUS


@pytest.mark.parametrize("state", JobState)
def test_every_state_that_has_not_ended_has_a_word_of_its_own(state: JobState):
    assert (state in STATUS) is not state.ended


def test_the_states_that_responses_name_are_those_of_jobs():
    assert {"queued", "running", "failed", "cancelled"} <= set(JobState)
