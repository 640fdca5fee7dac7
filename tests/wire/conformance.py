"""Runs the rules of `cases/` with both of fal's clients against one service: a process for each recipe, one after the other.

The app in the tests' process is asked for every rule under every recipe. On the other hostings, which differ in what lies before
the same app, every rule is checked once, and the recipes take turns.
"""

import ast
import asyncio
import base64
import json
import os
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.cli.commands.client_setup import python_settings
from deployments.files.file_store import FileStore
from deployments.hosting.connect_listener import ConnectListener
from deployments.hosting.tls import TlsFiles
from deployments.ingress.app import create_app
from deployments.jobs.keys import Scope
from deployments.jobs.store import JobStore
from deployments.settings import FetchSettings, Settings
from deployments.webhooks.courier import Courier
from deployments.webhooks.outbox import Outbox
from tests.patience import PATIENCE_S
from tests.wire.hosting import Hosted
from tests.wire.page import NODE
from tests.wire.service import listening, working

CASES = Path(__file__).with_name("cases")
JS, PYTHON = ("J1", "J2", "J3"), ("P1", "P2", "P4")
PROCESS_S = 160.0

Outcomes = dict[str, dict[str, str | None]]
"""Recipe -> rule's name -> null, or why it does not hold."""


@dataclass(frozen=True)
class Case:
    """A rule of one client. recipes: those under which it may be checked."""

    client: str
    rule: str
    recipes: tuple[str, ...]
    needs_keys: bool

    def __str__(self) -> str:
        return f"{self.client}-{self.rule}"


def declared() -> list[Case]:
    """Every case, read from the sources."""
    found = []
    script = "".join((CASES / file).read_text() for file in ("rules.mjs", "uploads.mjs"))
    constants = {"REALTIME": '{ only: ["J3"] }'}
    for name, options in re.findall(r'^  rule\("([a-z0-9-]+)", .*?^  \}(?:, (.*?))?\);$', script, re.MULTILINE | re.DOTALL):
        only = re.findall(r"J\d", constants.get(options, options))
        found.append(Case("javascript", name, tuple(only) or JS, "withKeys" in options))
    module = ast.parse("".join((CASES / file).read_text() for file in ("rules.py", "uploads.py")))
    groups = {"WITH_REST": ("P2", "P4"), "PYTHON": PYTHON}
    for function in module.body:
        decorators = getattr(function, "decorator_list", [])
        for decorator in (each for each in decorators if isinstance(each, ast.Call)):
            assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            options_of = {each.arg: each.value for each in decorator.keywords}
            group = ast.unparse(options_of["only"]) if "only" in options_of else "PYTHON"
            recipes = groups[group] if group in groups else ast.literal_eval(group)
            found.append(Case("python", function.name.replace("_", "-"), recipes, "with_keys" in options_of))
    return found


def chosen(hosting: str) -> dict[str, list[str]]:
    """Recipe -> the names of the rules that are checked under it on this hosting.

    A rule about all answers of a process is checked in every process, and one about keys where the service has keys.
    """
    names: dict[str, list[str]] = {recipe: [] for recipe in (*JS, *PYTHON)}
    first = ("uvicorn", "gateway", "serve").index(hosting)
    for turn, case in enumerate(declared(), first):
        if hosting == "uvicorn" or case.rule.startswith("every-"):
            recipes = case.recipes
        elif case.needs_keys:
            recipes = ()
        else:
            recipes = (case.recipes[turn % len(case.recipes)],)
        for recipe in recipes:
            names[recipe].append(case.rule)
    return names


async def outcomes(host: Hosted | None, hosting: str, database: str, home: Path, tls: TlsFiles) -> Outcomes:
    """host: the service; None: one with keys in this process."""
    settings = Settings(home=home, auth="keys", fetch=FetchSettings(allow_private=True)) if host is None else host.settings
    async with AsyncExitStack() as stack:
        store = await JobStore.open(database)
        stack.push_async_callback(store.close)
        keys = None
        if host is None:
            app = create_app(settings, store)
            base = await stack.enter_async_context(listening(app))
            tls_base = await stack.enter_async_context(listening(app, tls))
            keys = {who: await store.keys.create(who) for who in ("own", "other")}
            keys["reader"] = await store.keys.create("reader", scopes=[Scope.READ])
        else:
            base = tls_base = host.url
        workers = await JobStore.open(database, max_connections=16)
        stack.push_async_callback(workers.close)
        await stack.enter_async_context(working(workers, FileStore(settings.files_url), 0.02))
        await stack.enter_async_context(_delivering(store, settings))
        hooks, heard = await stack.enter_async_context(_receiving())
        tls_port = int(tls_base.rpartition(":")[2])
        listener = ConnectListener("127.0.0.1", tls_port)
        proxy = await asyncio.start_server(listener.serve, "127.0.0.1", 0)
        stack.push_async_callback(_ended, listener)
        stack.callback(proxy.close)
        proxy_url = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        tls_host = tls_base.removeprefix("https://")
        trust = {"SSL_CERT_FILE": str(tls.ca), "NODE_EXTRA_CA_CERTS": str(tls.ca)}
        python = {"FAL_KEY": (keys or {}).get("own", "anything"), **trust}
        environments = {
            **dict.fromkeys(JS, trust),
            "P1": python | python_settings(tls_host, tls.ca),  # as `reelray env` prints them
            "P2": python | {"HTTPS_PROXY": proxy_url, "NO_PROXY": "127.0.0.1,localhost"},
            "P4": python,
        }
        found = {}
        # One process at a time: the Python client gives a connection up after 5 s, which is little on a machine where many of
        # them and other tests wait for the same two cores.
        for recipe, rules in chosen(hosting).items():
            more = {"tlsPort": tls_port} if recipe in JS else {"hooks": hooks, "heard": heard}
            found[recipe] = await _run(recipe, {"base": base, "keys": keys, "rules": rules, **more}, environments[recipe])
        return found


async def _ended(listener: ConnectListener) -> None:
    """Returns when the connections of the clients, which have ended, are closed."""
    async with asyncio.timeout(PATIENCE_S):
        while listener.open:  # noqa: ASYNC110  (nothing tells of it)
            await asyncio.sleep(0.02)


async def _run(recipe: str, given: dict[str, Any], environment: dict[str, str]) -> dict[str, str | None]:
    command = (NODE, CASES / "harness.mjs", recipe) if recipe in JS else (sys.executable, "-m", "tests.wire.cases", recipe)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FAL_")}
    process = await asyncio.create_subprocess_exec(
        *command, env=inherited | environment | {"PYTHONPATH": os.getcwd()}, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(json.dumps(given).encode()), PROCESS_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, stderr.decode()
    answer: dict[str, str | None] = json.loads(stdout)
    return answer


@asynccontextmanager
async def _delivering(store: JobStore, settings: Settings) -> AsyncIterator[None]:
    courier = Courier(Outbox(store.database), settings.webhooks, allow_private=True, public_url=None)
    task = asyncio.create_task(courier.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _receiving() -> AsyncIterator[tuple[str, str]]:
    """A receiver of webhooks for the Python clients, which ask for what has come: GET answers the POST to the same path."""
    came: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head.split()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines) if name}
        told = came.setdefault(path, asyncio.get_running_loop().create_future())
        body = b""
        if method == "POST":
            content = await reader.readexactly(int(headers["content-length"]))
            if not told.done():
                told.set_result({"headers": headers, "body": base64.b64encode(content).decode()})
        else:
            body = json.dumps(await told).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield url, url
    finally:
        server.close()
