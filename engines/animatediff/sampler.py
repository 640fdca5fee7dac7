"""AnimateDiff's steps take a second or less together, so they are one unit."""

from engines.units import WholeSampler


class Sampler(WholeSampler):
    """See `engines.units.Sampler`."""
