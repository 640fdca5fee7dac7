"""Run by Serve in HAProxy's place, with its arguments: mends what no variable of Serve's sets, and becomes HAProxy.

    python haproxy_launch.py <haproxy> -db -f <config> ...

- Its pages of statistics are for this machine; Serve has them listen on every address, whatever the service listens on.
- Before Serve has told it of any replica, when the service starts or HAProxy was killed, it answered 404, which ends what a
  client waits for. 503 says what is true. Python's fal client repeats a 503 only of what it takes for nginx.

A text that a Serve of another version writes otherwise stays as it is. Standard library only: it runs at every reload.
"""

import os
import sys
from pathlib import Path

NOT_YET = 'http-request return status 503 content-type text/plain hdr retry-after 1 string "503, not up yet (this is no nginx)"'


def mended(config: str) -> str:
    """The text of Serve's configuration, ours in it."""
    lines = config.splitlines()
    section = ""
    for i, line in enumerate(lines):
        if line and not line[0].isspace():
            section = line.strip()
        indent, words = line[: len(line) - len(line.lstrip())], line.split()
        if section in ("frontend prometheus", "listen stats") and words[:1] == ["bind"]:
            lines[i] = f"{indent}bind 127.0.0.1:{words[1].rpartition(':')[2]}"
        if section == "backend default_backend" and line.strip().startswith("http-request return status 404 "):
            lines[i] = indent + NOT_YET
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    haproxy, arguments = sys.argv[1], sys.argv[2:]
    path = Path(arguments[arguments.index("-f") + 1])  # in place: Serve knows its own processes by this path
    path.write_text(mended(path.read_text()))
    os.execv(haproxy, [haproxy, *arguments])
