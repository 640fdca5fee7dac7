"""Which versions are refused, and which library messages an error quotes. `fake_tensorrt` stands in for the library."""

import sys

import pytest

from engines.backends.trt.library import Messages, load_library, require_supported
from engines.errors import EngineError
from tests.engines.backends.trt.fake_tensorrt import fake_tensorrt


def test_a_library_that_is_not_installed_is_our_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="tensorrt cannot be imported"):
        load_library("tensorrt")


def test_a_library_that_is_too_old_is_not_given_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.15.1.29"))
    with pytest.raises(EngineError, match=r"10\.15\.1\.29 is too old: 10\.16 or newer"):
        load_library("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.16.1"))
    assert load_library("tensorrt").__version__ == "10.16.1"


def test_only_weights_that_are_to_be_exchanged_rule_out_the_version_that_loses_biases():
    require_supported(fake_tensorrt("11.3.0.14"))
    with pytest.raises(EngineError, match="can lose biases"):
        require_supported(fake_tensorrt("11.3.0.14"), refit=True)
    for version in ("11.2.1", "11.3.1", "11.4.0.106"):
        require_supported(fake_tensorrt(version), refit=True)


def test_the_oldest_version_does_not_apply_to_tensorrt_rtx():
    rtx = fake_tensorrt("1.7.1.116")
    rtx.__name__ = "tensorrt_rtx"
    require_supported(rtx, refit=True)


def test_what_was_said_is_blamed_on_one_failure_only():
    said = Messages()
    assert said.fault("a").message == "a: the library gave no reason"
    for word in ("one", "two", "three", "four"):
        said.note(word)
    assert said.fault("b").message == "b: two; three; four"
    assert said.fault("c").message == "c: the library gave no reason"
