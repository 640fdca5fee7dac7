"""Hostile URLs and files for `test_hostile.py`: what each is, and where it stands in an input."""

import base64
import gzip
import io
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageCms

from engines.controlnext.demo_pose import puppet_image
from tests.engines.media.clips import KINDS, PLAYLISTS, audio_only, avi_of, huge, jpeg, refer_to, write

INTERNET = "127.0.0.2"
"""Stands for the public Internet: the tests take this one address for public."""
SECRET = "/secret"
"""What a server at 127.0.0.1 holds, and nobody may fetch."""

HOSTS: dict[str, list[list[str]]] = {
    "public.example": [[INTERNET]],
    "rebinds.example": [[INTERNET], ["127.0.0.1"]],
    "rebinds-to-v6.example": [[INTERNET], ["::1"]],
    "rebinds-to-both.example": [[INTERNET], [INTERNET, "127.0.0.1"]],
    "loopback.example": [["127.0.0.1"]],
    "v6.example": [["::1"]],
    "private.example": [["10.0.0.1"]],
    "metadata.example": [["169.254.169.254"]],
    "both.example": [[INTERNET, "192.168.0.1"]],
    "both-reversed.example": [["192.168.0.1", INTERNET]],
    "v4-and-v6.example": [[INTERNET, "fc00::1"]],
    "mapped.example": [["::ffff:127.0.0.1"]],
    "nat64.example": [["64:ff9b::7f00:1"]],
    "sixtofour.example": [["2002:7f00:1::"]],
    "teredo.example": [["2001:0:1:1:1:1:80ff:fffe"]],
}
"""Name -> the addresses of its first look-up, its second, and so on; the last ones stay."""

FORMS = (
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.1.",
    "0x7f.1",
    "0x7f000001",
    "0x7f.0x0.0x0.0x1",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "0",
    "0.0.0.0",
    "localhost",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:0:0:1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
    "[fc00::1]",
    "[fec0::1]",
    "[ff02::1]",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "198.18.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "127。0。0。1",
    "①②⑦.⓪.⓪.①",
    "public.example@127.0.0.1",
    "a:b@127.0.0.1",
    "nowhere.example",
)
"""Hosts that are this machine or in its network, in many spellings; and a name that there is not."""

URLS = (
    "ftp://public.example/x",
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "gopher://127.0.0.1:6379/_INFO",
    "javascript:alert(1)",
    "//127.0.0.1/secret",
    "/etc/passwd",
    "http://",
    "http:///secret",
    "http://[::1",
    "http://a b/",
    "http://xn--a/",
    "http://public.example:99999/",
    "http://public.example:-1/",
    "http://127.0.0.1:{port}\\@public.example/secret",
    "http://127.0.0.1:{port}#@public.example/",
    "http://public.example:{port}/%0d%0aHost:%20127.0.0.1",
    "http://public.example:{port}/\r\nHost: 127.0.0.1",
    "data:",
    "data:image/png;base64",
    "data:image/png,plain",
    "data:;base64,a*b=",
    "data:text/html;base64,PHNjcmlwdD4=",
)
"""Whole URLs. {port}: where both servers listen."""


def http(status: str, body: bytes = b"", *, length: int | None = None, **headers: str) -> bytes:
    fields = {"content-length": str(len(body) if length is None else length)} | headers
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


BOMB = gzip.compress(bytes(20_000_000), compresslevel=1)
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ANSWERS: dict[str, bytes] = {
    "/not-found": http("404 Not Found"),
    "/forbidden": http("403 Forbidden", b"x"),
    "/error": http("500 Oops"),
    "/empty": http("204 No Content"),
    "/partial": http("206 Partial Content", b"x"),
    "/not-modified": http("304 Not Modified"),
    "/large": http("200 OK", length=10**12),
    "/bomb": http("200 OK", BOMB, content_encoding="gzip"),
    "/bomb-twice": http("200 OK", gzip.compress(BOMB), content_encoding="gzip, gzip"),
    "/bomb-deflate": http("200 OK", zlib.compress(bytes(50_000_000)), content_encoding="deflate"),
    "/brotli": http("200 OK", b"x", content_encoding="br"),
    "/zstd": http("200 OK", b"x", content_encoding="zstd"),
    "/not-gzip": http("200 OK", b"this is not gzip", content_encoding="gzip"),
    "/short": http("200 OK", b"he", length=9),
    "/two-lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "/negative-length": http("200 OK", b"x", length=-1),
    "/bad-chunk": CHUNKED + b"zz\r\nhello\r\n0\r\n\r\n",
    "/huge-chunk": CHUNKED + b"ffffffffffffffff\r\n" + b"x" * 1000,
    "/long-header": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 300_000 + b"\r\n\r\n",
    "/many-headers": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
    "/no-http": b"SSH-2.0-OpenSSH_9.9\r\n",
    "/nothing": b"",
    "/switching": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    "/loop": http("302 Found", location="/loop"),
    "/to-file": http("302 Found", location="file:///etc/passwd"),
    "/to-ftp": http("302 Found", location="ftp://public.example/"),
    "/to-data": http("302 Found", location="data:image/png;base64,aGk="),
    "/to-nowhere": http("302 Found", location=""),
    "/to-garbage": http("302 Found", location="http://[::1"),
    "/to-control": http("302 Found", location="http://127.0.0.1:1/\x01"),
    "/html": http("200 OK", b"<html><script>fetch('http://127.0.0.1')</script></html>", content_type="image/png"),
}
"""Path -> what a server on the Internet answers there."""
SLOW = {
    "/slow-head": [b"HTTP/1.1 200 OK\r\n"],
    "/slow-body": [b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"],
    "/slow-chunks": [CHUNKED, b"1\r\nx\r\n"],
    "/silent": [],
}
"""Path -> what comes at first; then a byte every 50 ms, or nothing."""


def data_uri(data: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(height: int, width: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def images() -> Iterator[tuple[str, bytes]]:
    """Bombs, malformed pictures, and what is no picture of a served format."""
    grey = Image.new("RGB", (64, 64), "grey")
    yield "a header of ten gigapixels", png(100_000, 100_000, chunk(b"IDAT", b""))
    yield "400 megapixels in 400 kB", encoded(Image.new("1", (20_000, 20_000)), "PNG")
    yield "400 megapixels of a TIFF", encoded(Image.new("1", (20_000, 20_000)), "TIFF", compression="tiff_lzw")
    yield "a GIF's screen of 4 gigapixels", b"GIF89a\xff\xff\xff\xff" + encoded(grey, "GIF")[10:]
    yield "a BMP of ten gigapixels", encoded(grey, "BMP")[:18] + struct.pack("<ii", 100_000, 100_000) + encoded(grey, "BMP")[26:]
    yield "a JPEG of 4 gigapixels", encoded(grey, "JPEG").replace(struct.pack(">HH", 64, 64), b"\xff\xff\xff\xff", 1)
    yield "no pixel data", png(64, 64)
    yield "pixel data of another size", png(64, 64, chunk(b"IDAT", zlib.compress(b"x")))
    yield "pixel data that is not compressed", png(64, 64, chunk(b"IDAT", b"x" * 1000))
    yield "a side of 0", png(0, 64, chunk(b"IDAT", zlib.compress(b"")))
    yield "a colour type that there is not", png(64, 64).replace(b"\x08\0\0\0\0", b"\x08\x09\0\0\0")
    yield "a bomb beside the pixels", png(64, 64, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(60_000_000))))
    yield "a bomb of text", png(64, 64, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(60_000_000))))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        yield f"the first 20 bytes of a {kind}", encoded(grey, kind)[:20]
    tiff = bytearray(encoded(grey, "TIFF"))
    (first,) = struct.unpack_from("<I", tiff, 4)
    yield "a TIFF that ends before its directory", bytes(tiff[:8]) + b"\0\0"
    yield "a TIFF whose directory is itself", bytes(tiff[:4]) + struct.pack("<I", 4) + bytes(tiff[8:])
    yield "a TIFF whose directory lies behind the file", bytes(tiff[:4]) + struct.pack("<I", 1 << 31) + bytes(tiff[8:first])
    yield "a WEBP whose size lies", encoded(grey, "WEBP")[:4] + b"\xff\xff\xff\x7fWEBPVP8 " + b"\xff" * 40
    yield "a floating-point TIFF", encoded(Image.new("F", (64, 64)), "TIFF")
    for kind, mode in (("PPM", "RGB"), ("ICO", "RGB"), ("TGA", "RGB"), ("PCX", "RGB"), ("DDS", "RGB"), ("SGI", "RGB")):
        yield f"a {kind}", encoded(grey.convert(mode), kind)
    for kind in ("JPEG2000", "PDF", "EPS"):
        yield f"a {kind}", encoded(grey, kind)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "a colour profile alone", profile
    yield from OTHERS.items()


OTHERS = {
    "nothing": b"",
    "a byte": b"\0",
    "a text": b"just a text",
    "a page": b"<html><script>alert(1)</script></html>",
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1/secret'/></svg>",
    "an SVG that includes a file": b"<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><svg>&e;</svg>",
    "a Photoshop file": b"8BPS\0\1" + bytes(100),
    "a script for ImageMagick": b"push graphic-context\nimage over 0,0 0,0 'url(http://127.0.0.1/secret)'\npop graphic-context",
    "an archive": b"PK\3\4" + bytes(100),
    "a program": b"\x7fELF" + bytes(100),
    "a pickle": b"\x80\4\x8c\2os\x8c\6system\x93\x8c\4true\x85R.",
    "an AVIF": b"\0\0\0\x1cftypavif" + bytes(100),
    "a HEIC": b"\0\0\0\x1cftypheic" + bytes(100),
}
"""What is neither a picture nor a video of a served format."""


def videos(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Bombs, malformed and nested videos, playlists, and what is no video of a served format."""
    for kind in ("mp4", "h264", "mpeg4", "webm", "avi", "gif"):
        yield f"a frame of gigapixels, {kind}", huge(folder, kind).read_bytes()
    other = write(folder / "other.mp4")
    for kind, text in PLAYLISTS.items():
        playlist = text.format(other=other).encode()
        yield f"a playlist, {kind}", playlist
        yield f"a playlist as an mp4, {kind}", b"\0\0\0\x14ftypisom\0\0\0\0isom" + playlist
        yield f"a playlist as Matroska, {kind}", b"\x1a\x45\xdf\xa3" + playlist
        yield f"a playlist as an AVI, {kind}", b"RIFF\0\0\0\0AVI " + playlist
    reference = write(folder / "reference.mov")
    refer_to(reference, write(folder / "secret.mov"))
    yield "samples in another file", reference.read_bytes()
    data = bytearray(write(folder / "index.mp4", **KINDS["fragmented.mp4"]).read_bytes())
    run = data.index(b"trun") + 4
    data[run : run + 8] = struct.pack(">II", 0, 64_000_000)
    yield "an index of 64 million samples", bytes(data)
    yield "a box that never ends", b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\1moov" + b"\xff" * 8
    yield (
        "boxes in boxes",
        b"\0\0\0\x10ftypisom\0\0\0\0" + b"".join(struct.pack(">I", 80_000 - 8 * n) + b"moov" for n in range(10_000)),
    )
    yield "elements in elements", b"\x1a\x45\xdf\xa3\x80" + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" * 5000
    yield "lists in lists", b"RIFF\xff\xff\xff\xffAVI " + b"LIST\xff\xff\xff\x7fhdrl" * 5000
    whole = other.read_bytes()
    yield "the first half", whole[: len(whole) // 2]
    yield "without its index", whole[: whole.index(b"moov") - 4]
    yield "zeros after its header", whole[:48] + bytes(len(whole) - 48)
    yield "sound alone", audio_only(folder / "sound.mp4").read_bytes()
    yield "sound with a cover picture", audio_only(folder / "cover.mp4", with_cover=True).read_bytes()
    yield "frames of zeros", avi_of(folder / "zeros.avi", "mjpeg", [bytes(500)] * 9).read_bytes()
    yield "frames that grow", avi_of(folder / "grows.avi", "mjpeg", [jpeg(48, 64), jpeg(2000, 2000)]).read_bytes()
    long = whole.replace(b"mvhd" + whole[whole.index(b"mvhd") + 4 :][:20], b"mvhd" + bytes(12) + struct.pack(">II", 1, 1 << 31))
    at = long.index(b"mdhd") + 16
    yield "a duration of 68 years", long[:at] + struct.pack(">II", 1, 1 << 31) + long[at + 8 :]
    for suffix, codec, pixels in (("ts", "mpeg2video", "yuv420p"), ("flv", "flv1", "yuv420p"), ("nut", "ffv1", "yuv420p")):
        yield f"another container, {suffix}", write(folder / f"clip.{suffix}", codec=codec, pix_fmt=pixels).read_bytes()
    for codec, pixels in (("ffv1", "yuv420p"), ("mpeg2video", "yuv420p"), ("rawvideo", "yuv420p")):
        yield f"another codec, {codec}", write(folder / f"{codec}.mkv", codec=codec, pix_fmt=pixels).read_bytes()
    streams = io.BytesIO()
    with av.open(streams, "w", "mov") as output:
        for _ in range(40):
            stream = output.add_stream("mjpeg", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for stream in output.streams.video:
            output.mux([*stream.encode(av.VideoFrame(64, 48, "yuvj420p")), *stream.encode()])
    yield "forty streams", streams.getvalue()
    yield "a picture", puppet_image(64, 64)
    yield "noise", np.random.default_rng(0).bytes(10_000)
    yield from OTHERS.items()


class Resolver:
    """A name server of the test's own, in place of `socket.getaddrinfo`."""

    def __init__(self) -> None:
        self._real = socket.getaddrinfo
        self.asked: dict[str, int] = {}

    def __call__(self, host: str, port: int, **options: int) -> list[tuple[object, ...]]:
        if host in HOSTS:
            turn = self.asked[host] = self.asked.get(host, 0) + 1
            addresses = HOSTS[host][min(turn, len(HOSTS[host])) - 1]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]
        if host == "localhost" or set(host) <= set("0123456789abcdefx.:"):
            return list(self._real(host, port, **options))
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
