"""Runs the rules of `rules.py` and `uploads.py` with the unmodified fal-client, many at a time, in one process:

    python -m tests.wire.cases <recipe>     (on standard input: what `Given` holds, as JSON)

and prints {rule's name: null, or why it does not hold}. The recipes are those of fal-queue-protocol.md, section 1.4. P1 and P2
are environment variables, which the client reads when it is imported; P4 is five assignments.
"""

import asyncio
import json
import os
import sys

import fal_client.client

from tests.wire.cases import rules, uploads
from tests.wire.cases.harness import RULES, Given, outcomes, record


def main() -> None:
    given = Given(sys.argv[1], **json.load(sys.stdin))
    record()
    if given.recipe == "P4":
        for name, value in {
            "RUN_URL_FORMAT": f"{given.base}/run/",
            "QUEUE_URL_FORMAT": f"{given.base}/queue/",
            "REALTIME_URL_FORMAT": f"ws{given.base.removeprefix('http')}/run/",
            "REST_URL": f"{given.base}/rest",
            "CDN_URL": f"{given.base}/cdn",
        }.items():
            assert hasattr(fal_client.client, name)
            setattr(fal_client.client, name, value)
    rules.begin(given)
    assert uploads  # it has added its rules
    chosen = [each for each in RULES if each.name in given.rules]
    last = [each for each in chosen if each.name.startswith("every-")]

    async def check() -> None:
        done = await outcomes([each for each in chosen if each not in last]) | await outcomes(last)
        print(json.dumps(done), flush=True)  # noqa: T201  (its output is its result)
        os._exit(0)

    asyncio.run(check())


main()
