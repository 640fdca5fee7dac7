"""Groups of tests for the workers of pytest-xdist."""

from xdist.scheduler import LoadScopeScheduling

from tests.groups import group_of


class GroupScheduling(LoadScopeScheduling):
    """pytest-xdist's scheduling by scope, the scope being our group: its own `loadgroup` sees no groups with pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
