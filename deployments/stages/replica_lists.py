"""Which replicas each deployment has, as far as this process's Serve routers know, and who wants to hear of it.

A module of its own, because Serve copies a router's class into every process together with the module that it is in: state that
stood there would be another copy's.
"""

import asyncio
from collections.abc import Callable

Changed = Callable[[frozenset[str]], None]

_watchers: dict[str, list[Changed]] = {}
_listed: dict[str, frozenset[str]] = {}


def watch(deployment: str, changed: Changed) -> None:
    """Calls `changed` in the running event loop with the replicas' names, now if they are known, and whenever that changes."""
    loop = asyncio.get_running_loop()

    def tell(names: frozenset[str]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(changed, names)

    _watchers.setdefault(deployment, []).append(tell)
    if deployment in _listed:
        tell(_listed[deployment])


def announce(deployment: str, names: frozenset[str]) -> None:
    """A deployment now has these replicas. May be called in any thread."""
    _listed[deployment] = names
    for tell in _watchers.get(deployment, ()):
        tell(names)
