"""A stage replica in its own process: three stages of some milliseconds each behind a Unix socket, one call at a time.

    python -m tests.chaos.stage SOCKET

A call is a connection: a line of JSON in, lines of JSON out, as in `deployments/stages/protocol.py`. Hanging up cancels the call.
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
    """What a stage returns for its input: the same each time, so that a job's clip is known whichever attempt made it."""
    if stage == "decode":
        return {"mp4": clip_of(given["prompt"], given["seed"]), "seed": given["seed"]}
    return given


def clip_of(prompt: str, seed: int) -> str:
    return f"a clip of {prompt} from seed {seed}"


class Replica:
    """Does one unit of work at a time, whichever stage it belongs to."""

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
    listening = f"{path}.{os.getpid()}"  # created under another name, then renamed: a caller only finds a socket that listens
    server = await asyncio.start_unix_server(Replica().call, listening)
    os.rename(listening, path)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
