"""How much of diffusers' work ours saves, at full size. Counts are exact on every machine, whatever its load."""

import pytest

from tests.load.bench_flops import ANIMATEDIFF_TARGET, CONTROLNEXT_TARGET, SVD_CALL_TARGET, Job, animatediff, controlnext


@pytest.fixture(scope="module")
def controlnext_job() -> Job:
    return controlnext()


@pytest.fixture(scope="module")
def animatediff_job() -> Job:
    return animatediff()


def test_an_svd_call_leaves_out_the_cross_attention_to_one_token(controlnext_job: Job):
    assert controlnext_job.call.ratio <= SVD_CALL_TARGET


def test_a_whole_controlnext_job_is_within_its_target(controlnext_job: Job):
    assert controlnext_job.whole.ratio <= CONTROLNEXT_TARGET


def test_a_whole_animatediff_job_is_within_its_target(animatediff_job: Job):
    assert animatediff_job.whole.ratio <= ANIMATEDIFF_TARGET


def test_theirs_are_the_published_sizes(controlnext_job: Job, animatediff_job: Job):
    """Compares with video-models.md, 4.1 and 4.4: a net of the wrong size on their side would make the ratios wrong."""
    tera = [round(count.theirs / 1e12, 1) for job in (controlnext_job, animatediff_job) for count in (job.call, job.whole)]
    assert tera == [153.5, 55112.4, 17.7, 135.7]
