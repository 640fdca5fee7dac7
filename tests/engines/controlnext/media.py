"""Files whose headers claim more than they contain."""

import zlib

from engines.controlnext.demo_pose import puppet_image


def huge_png() -> bytes:
    """A PNG whose header says 100,000 x 100,000 pixels, with a correct checksum."""
    png = puppet_image(64, 64)
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
