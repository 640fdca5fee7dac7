"""Notices a node that joins the Ray cluster of a running service whose database or files are on one node.

The build refuses such a cluster. A node that joins later, by hand or by autoscaling, would get replicas that read other files and
start a database of their own, so the service says it as loudly as it can.
"""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from deployments.settings import Settings, Split

logger = logging.getLogger(__name__)

CHECK_S = 15.0


class NodeWatch:
    """count: returns how many nodes the cluster has; called every `CHECK_S` seconds at most."""

    def __init__(self, settings: Settings, count: Callable[[], int]):
        self._settings, self._count = settings, count
        self._nodes, self._due = 1, 0.0

    def check(self) -> None:
        """Raises `Split` while the cluster has nodes that the service cannot use. Blocks for a call of `count`."""
        if monotonic() >= self._due:
            self._nodes, self._due = self._count(), monotonic() + CHECK_S
        self._settings.refuse_split(self._nodes)

    async def watch(self) -> None:
        """Logs it again and again, for as long as it is so."""
        while True:
            try:
                await asyncio.to_thread(self.check)
            except Split as exc:
                logger.critical(exc.message, extra={"action": "split"})
            except Exception:
                logger.exception("the cluster's nodes were not counted", extra={"action": "nodes_unknown"})
            await asyncio.sleep(CHECK_S)
