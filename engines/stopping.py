"""How a stage obeys `should_stop`: it is called before every unit of work."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from engines.errors import Cancelled
from engines.spec import ShouldStop

T = TypeVar("T")


def check(should_stop: ShouldStop | None) -> None:
    """Raises `Cancelled` if it is time to stop."""
    if should_stop is not None and should_stop():
        raise Cancelled


def stoppable(items: Iterable[T], should_stop: ShouldStop | None) -> Iterator[T]:
    """The items. Raises `Cancelled` instead of making the next once `should_stop` says so."""
    iterator = iter(items)
    while True:
        check(should_stop)
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item
