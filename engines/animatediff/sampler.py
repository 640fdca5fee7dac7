"""AnimateDiff's steps take a second or less together, so they are one unit.

Requests are not batched: on an H200 two clips in one call of the UNet take as long as two calls, 94.1 and 2 x 46.9 ms.
"""

from engines.units import WholeSampler


class Sampler(WholeSampler):
    """See `engines.units.Sampler`."""
