"""How a stage obeys `should_stop`: its work comes as items, and before each is made it is asked."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from engines.errors import Cancelled
from engines.spec import ShouldStop

T = TypeVar("T")


def stoppable(items: Iterable[T], should_stop: ShouldStop | None) -> Iterator[T]:
    """The items. Raises `Cancelled` instead of making the next once `should_stop` says so."""
    iterator = iter(items)
    while should_stop is None or not should_stop():
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item
    raise Cancelled
