"""Serve runs this instead of HAProxy, with HAProxy's arguments: it corrects the configuration file, then becomes HAProxy.

    python haproxy_launch.py <certificate and key, or nothing> <haproxy> -db -f <config> ...

No variable of Serve's sets these:
- The pages of statistics listen on this machine only. Serve has them listen on every address, whatever the service listens on.
- While HAProxy knows of no replica, after a start or a restart, it answers 503. With Serve's 404, clients would stop waiting for
  their requests. fal's Python client repeats a 503 only if it takes the server for nginx, hence the text.
- Replicas listen on the service's host only. If that is an address of its own, such as ::1, HAProxy must look for them there.
  Serve has it look at 127.0.0.1 for all replicas of its node.
- With a certificate, callers speak TLS with HAProxy, and the replicas are told so. Serve knows TLS for its own proxy only.
- It is TLS 1.2 at most, because of fal's Python client: a thread of its WebSocket reads while another sends the handshake, which
  `ssl` of Python does not stand. The session tickets of TLS 1.3 come at that very moment: on a machine under load 2 to 11
  handshakes in a thousand were never answered, and with TLS 1.2 none of 3,171.
- A caller whose WebSocket is refused is hung up on, as by uvicorn. The replica says so, but HAProxy would keep the connection,
  and that client waits for its end.

Lines that another version of Serve writes differently stay as they are. Standard library only: this runs at every reload.

HAProxy also ends with the process that has started it, however that ends. Alone, it would keep the port and answer 500.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""

HANG_UP = """\
http-request set-var(txn.upgrade) bool(true) if { hdr(Upgrade) -m found }
http-after-response set-header Connection close if { var(txn.upgrade) -m bool } !{ status 101 }"""
NOT_YET = 'http-request return status 503 content-type text/plain hdr retry-after 1 string "503, not up yet (this is no nginx)"'


def mended(config: str, certificate: str = "") -> str:
    """The text of Serve's configuration, corrected. certificate: the path of a file with a certificate chain and its key."""
    lines = config.splitlines()
    section, host = "", "*"
    for i, line in enumerate(lines):
        if line and not line[0].isspace():
            section = line.strip()
        indent, words = line[: len(line) - len(line.lstrip())], line.split()
        if section in ("frontend prometheus", "listen stats") and words[:1] == ["bind"]:
            lines[i] = f"{indent}bind 127.0.0.1:{words[1].rpartition(':')[2]}"
        if section == "frontend http_frontend" and words[:1] == ["bind"]:
            host = words[1].rpartition(":")[0]
            added = HANG_UP
            if certificate:
                line += f" ssl crt {certificate} alpn http/1.1 ssl-max-ver TLSv1.2"
                added += "\nhttp-request set-header X-Forwarded-Proto https"
            lines[i] = line + "".join(f"\n{indent}{each}" for each in added.splitlines())
        if words[:1] == ["server"] and words[2].startswith("127.0.0.1:") and host not in ("*", "127.0.0.1", "localhost"):
            words[2] = f"{f'[{host}]' if ':' in host else host}:{words[2].rpartition(':')[2]}"
            lines[i] = indent + " ".join(words)
        if section == "backend default_backend" and line.strip().startswith("http-request return status 404 "):
            lines[i] = indent + NOT_YET
    return "\n".join(lines) + "\n"


def end_with_parent() -> None:
    """Has Linux kill this process when its parent dies, also after it has become another program."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died just before
        sys.exit(1)


if __name__ == "__main__":
    end_with_parent()
    certificate, haproxy, *arguments = sys.argv[1:]
    path = Path(arguments[arguments.index("-f") + 1])  # in place: Serve knows its own processes by this path
    path.write_text(mended(path.read_text(), certificate))
    os.execv(haproxy, [haproxy, *arguments])
