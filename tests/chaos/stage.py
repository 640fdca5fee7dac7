"""A stage replica as a process of its own: three stages of some milliseconds each behind a Unix socket, one call at a time.

    python -m tests.chaos.stage SOCKET

A call is a connection: a line of JSON in, lines of JSON out, as in `deployments/stages/protocol.py`. Who hangs up has cancelled.
"""

import asyncio
import json
import os
import random
import sys
from contextlib import suppress
from typing import Any

STEPS = 4
STEP_S = (0.005, 0.05)


def product_of(stage: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a stage makes of what it is given: the same each time, so that any attempt's clip can be told from its job."""
    if stage == "decode":
        return {"mp4": clip_of(given["prompt"], given["seed"]), "seed": given["seed"]}
    return given


def clip_of(prompt: str, seed: int) -> str:
    return f"a clip of {prompt} from seed {seed}"


class Replica:
    """One unit of work at a time, whichever stage it is of."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()

    async def call(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def say(**line: Any) -> None:
            writer.write(json.dumps(line).encode() + b"\n")
            await writer.drain()

        with suppress(ConnectionError):
            asked = json.loads(await reader.readline() or b"{}")
            async with self.turn:
                await say(note="")
                for step in range(1, STEPS + 1):
                    if not asked or reader.at_eof():
                        break
                    await asyncio.sleep(random.uniform(*STEP_S))
                    if asked["stage"] == "denoise":
                        await say(note=f"step {step}/{STEPS}")
                else:
                    await say(done=0.1, product=product_of(asked["stage"], asked["given"]))
        writer.close()


async def serve(path: str) -> None:
    listening = f"{path}.{os.getpid()}"  # made beside and renamed: nobody meets a socket that does not listen
    server = await asyncio.start_unix_server(Replica().call, listening)
    os.rename(listening, path)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
