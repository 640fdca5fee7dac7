"""How a memory-bound kernel is cut into programs.

The tables of tiles are fixed, and the first entry is the default: choosing by timing at run time would let two processes
add in different orders, and the same seed would no longer give the same bits. `bench_fusions.py` measures all entries.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program works on: rows x columns values at a time by that many warps, `repeats` times one below the other."""

    rows: int
    columns: int
    warps: int
    repeats: int = 1


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no smaller than n >= 1. Triton's tiles have such sides."""
    return 1 << (n - 1).bit_length()
