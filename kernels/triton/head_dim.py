"""A head dimension as one or two tiles.

Triton's tiles are powers of two: one tile for 40, 80 or 160 would be 64, 128 or 256 wide, 1.6 times the work and the registers.
"""

NARROWEST = 16
"""The least that a matrix instruction contracts at once."""
WIDEST = 160
"""128 + 32, the widest head of the models; its tiles fill the registers."""


def split(head_dim: int) -> tuple[int, int]:
    """The widths of the two tiles, the second 0 where one is enough: 40 is 32 + 16 (half of it padding), 80 is 64 + 16.

    Raises `ValueError` for a head dimension that no tile serves: rows must begin at multiples of 16 bytes to be read in one go.
    """
    if head_dim % 8 or not 0 < head_dim <= WIDEST:
        raise ValueError(f"head dimension {head_dim} is no multiple of 8 between 8 and {WIDEST}")
    first = max(NARROWEST, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return first, max(NARROWEST, 1 << (rest - 1).bit_length()) if rest > 0 else 0
