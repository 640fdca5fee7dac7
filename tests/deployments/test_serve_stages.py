import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayError, RayTaskError

from deployments.serve_stages import translated
from engines.errors import ImageLoadError, RunnerDisconnected, RunnerFailed


def crossed(cause: Exception) -> RayError:
    """An error as Ray hands it to the caller of a task that raised `cause`."""
    return RayTaskError("run", "a traceback with pid 7 at 10.0.0.7", cause).as_instanceof_cause()


def test_our_own_error_comes_back_as_it_was_raised():
    error = translated(crossed(ImageLoadError("damaged", ("body", "x"), {"a": 1})))
    assert type(error) is ImageLoadError
    assert (error.message, error.loc, error.ctx) == ("damaged", ("body", "x"), {"a": 1})


def test_a_bug_in_a_stage_is_a_failure_that_tells_nothing():
    error = translated(crossed(RuntimeError("CUDA error at 10.0.0.7")))
    assert type(error) is RunnerFailed
    assert not error.retryable
    assert "10.0.0.7" not in error.message


@pytest.mark.parametrize("trouble", [ActorDiedError(), ObjectLostError("a" * 56, None, ""), crossed(ActorDiedError())])
def test_rays_troubles_are_worth_another_try(trouble: Exception):
    assert type(translated(trouble)) is RunnerDisconnected
    assert translated(trouble).retryable
