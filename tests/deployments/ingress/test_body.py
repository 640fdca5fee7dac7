"""The bodies of submissions: how many are held, and what is parsed of them."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fastapi import Request

from deployments.files.download import Refused
from deployments.ingress import body as bodies
from deployments.ingress.body import INLINE_BYTES, MAX_FIELDS_BYTES, PIECE_BYTES, SMALL_BYTES, Bodies, split, unescaped
from engines.errors import BodyTooLarge, TooManyRequests
from tests.patience import PATIENCE_S

URI = "data:image/png;base64," + "A" * 2 * INLINE_BYTES


def sent(**given: Any) -> bytearray:
    return bytearray(json.dumps(given).encode())


def request_of(size: int) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * size, "more_body": False}

    return Request({"type": "http", "headers": [(b"content-length", b"%d" % size)]}, receive)


async def test_large_data_uris_are_taken_out_and_nothing_else():
    long_url = "https://a.example/" + "x" * INLINE_BYTES
    given = {"prompt": f'say "{URI}"', "a": URI, "b": [{"c": URI}], "d": "data:,short", "e": long_url}
    found = await split(sent(**given))
    left = json.loads(found.fields)
    names = [left["a"], left["b"][0]["c"]]
    assert [bytes(found.uris[name]).decode() for name in names] == [URI, URI]
    assert left | {"a": URI, "b": [{"c": URI}]} == given
    assert (await split(bytearray(found.fields))).fields == found.fields


@pytest.mark.parametrize("at", [PIECE_BYTES - 3, PIECE_BYTES - len(b'"data:') + 1])
async def test_a_data_uri_is_found_across_the_pieces_of_a_body(at: int):
    head = b'{"prompt": "' + b"x" * (at - len(b'{"prompt": "') - len(b'","u":')) + b'","u":'
    body = bytearray(head + b'"' + URI.encode() * 20 + b'"}')
    with pytest.raises(BodyTooLarge):  # for its prompt; the URI of 650 kB does not count
        await split(body)
    assert bodies._find(body, b'"data:', 0) == at


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}",
        b'{"prompt": "' + b"x" * MAX_FIELDS_BYTES + b'"}',
        b'"data:' * 100_000,
        b'"data:' + b'\\"' * 200_000,
    ],
    ids=["fields", "a text", "openings", "escapes"],
)
async def test_what_would_take_long_to_parse_is_refused_before(body: bytes):
    with pytest.raises(BodyTooLarge):
        await split(bytearray(body))


@pytest.mark.parametrize("size", [10, PIECE_BYTES, 2 * PIECE_BYTES + 1])
def test_escapes_are_undone_wherever_a_piece_ends(size: int):
    for pad in range(7):  # PHP escapes slashes, .NET the plus
        text = "x" * pad + "/+" * size
        escaped = text.replace("/", "\\/").replace("+", "\\u002b").encode()
        pieces = list(unescaped(memoryview(escaped)))
        assert b"".join(pieces).decode() == text
        assert max(map(len, pieces)) <= PIECE_BYTES


@pytest.mark.parametrize("text", [b"\\" * 3 * PIECE_BYTES, b"\\u00", b"\\ud800", b"\\x"])
def test_what_is_no_json_text_is_refused(text: bytes):
    with pytest.raises(Refused):
        list(unescaped(memoryview(text)))


async def test_the_same_body_has_the_same_digest_and_another_one_has_not():
    one, same, other = [await split(sent(a=uri)) for uri in (URI, URI, URI + "A")]
    assert one.fields != same.fields
    assert one.digest_fields() == same.digest_fields() != other.digest_fields()


# How many are held


async def test_bodies_in_hand_are_capped_and_the_next_waits_its_turn():
    room, large = Bodies(1_000_000), 300_000
    order = list[int]()

    async def next_one(number: int, size: int) -> None:
        async with room.read(request_of(size), 10**9):
            order.append(number)

    async with AsyncExitStack() as first:
        for _ in range(2):  # of 750,000 bytes for large ones
            await first.enter_async_context(room.read(request_of(large), 10**9))
        waiting = [asyncio.create_task(next_one(number, size)) for number, size in enumerate([large, 100_000, SMALL_BYTES])]
        async with asyncio.timeout(PATIENCE_S):
            while not order:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert order == [2]  # small ones have room of their own
    await asyncio.gather(*waiting)
    assert order == [2, 0, 1]


async def test_a_body_that_fails_gives_its_room_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "ROOM_TIMEOUT_S", 0.01)
    room = Bodies(200_000)
    for _ in range(3):
        with pytest.raises(KeyError):
            async with room.read(request_of(150_000), 10**9):
                raise KeyError
    async with room.read(request_of(150_000), 10**9):
        with pytest.raises(TooManyRequests):
            async with room.read(request_of(150_000), 10**9):
                pass
    async with room.read(request_of(150_000), 10**9) as body:
        assert len(body) == 150_000
