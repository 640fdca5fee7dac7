"""Messages between a replica and the child that decodes for it: JSON, then bytes. Neither side ever unpickles anything."""

import json
import struct
from collections.abc import Callable
from socket import socket
from typing import Any

MAX_JSON_BYTES = 65_536
_HEAD = struct.Struct("!IQ")
"""Sizes of the JSON and of the bytes after it."""


class Closed(Exception):
    """The other process has ended, or does not keep to the protocol."""


def send(to: socket, fields: dict[str, Any], body: bytes | memoryview = b"") -> None:
    """Sends one message. Raises `OSError`."""
    text = json.dumps(fields).encode()
    to.sendall(_HEAD.pack(len(text), len(body)) + text)
    to.sendall(body)


def receive(source: socket, waiting: Callable[[], None] | None = None) -> tuple[dict[str, Any], int]:
    """The next message's fields, and how many bytes follow them, for `fill`.

    waiting: called whenever the socket's timeout passes without a byte; it may raise. Raises `Closed`.
    """
    head = memoryview(bytearray(_HEAD.size))
    fill(source, head, waiting)
    text_bytes, body_bytes = _HEAD.unpack(head)
    if text_bytes > MAX_JSON_BYTES:
        raise Closed
    text = memoryview(bytearray(text_bytes))
    fill(source, text, waiting)
    try:
        fields = json.loads(bytes(text))
    except (ValueError, RecursionError) as exc:
        raise Closed from exc
    if not isinstance(fields, dict):
        raise Closed
    return fields, body_bytes


def fill(source: socket, room: memoryview, waiting: Callable[[], None] | None = None) -> None:
    """Reads until `room`, of bytes, is full. Raises `Closed`."""
    while room:
        try:
            count = source.recv_into(room)
        except TimeoutError:
            if waiting is None:
                raise
            waiting()
            continue
        except OSError as exc:
            raise Closed from exc
        if not count:
            raise Closed
        room = room[count:]
