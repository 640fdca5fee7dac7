from engines.units import WholeSampler


class Sampler(WholeSampler):
    """All of a request is one unit."""
