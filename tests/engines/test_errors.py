import pickle

import pytest

from engines import errors
from engines.errors import ReelrayError


def all_errors() -> list[type[ReelrayError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ReelrayError)]


@pytest.mark.parametrize("error", all_errors())
def test_every_error_survives_pickling(error: type[ReelrayError]):
    exc = error("message", ("body", "x", 1), {"max": 3})
    back = pickle.loads(pickle.dumps(exc))
    assert type(back) is error
    assert (back.message, back.loc, back.ctx, str(back)) == ("message", ("body", "x", 1), {"max": 3}, "message")


@pytest.mark.parametrize("error", all_errors())
def test_every_error_has_a_default_message(error: type[ReelrayError]):
    assert error().message.endswith(".")
