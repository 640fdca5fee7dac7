"""Lets a stage be stopped: `should_stop` is called before every unit of work."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from engines.errors import Cancelled
from engines.spec import ShouldStop

T = TypeVar("T")


def check(should_stop: ShouldStop | None) -> None:
    """Raises `Cancelled` if `should_stop` returns true."""
    if should_stop is not None and should_stop():
        raise Cancelled


def stoppable(items: Iterable[T], should_stop: ShouldStop | None) -> Iterator[T]:
    """Yields the items. Before each it calls `should_stop` and raises `Cancelled` if that returns true."""
    iterator = iter(items)
    while True:
        check(should_stop)
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item
