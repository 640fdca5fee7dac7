import asyncio
import fcntl
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import psutil
import pytest

from deployments.hosting import guardian
from deployments.hosting.embedded_postgres import (
    GUARDED,
    SERVICE_USER,
    PostgresFailed,
    database_url,
    owner_file,
    stop_embedded,
)
from deployments.hosting.guardian import guarded
from deployments.jobs.database import StoreAway
from deployments.jobs.job import JobState, LeaseLost, NewJob
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.conftest import embedded
from tests.patience import PATIENCE_S

NEW = NewJob("fal-ai/fake", {"prompt": "a cat"})


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls wait for the server however long its start takes."""
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", PATIENCE_S)


def postmaster(settings: Settings) -> psutil.Process:
    return psutil.Process(int((settings.home / "postgres" / "data" / "postmaster.pid").read_text().split()[0]))


def has_ended(process: psutil.Process) -> bool:
    """A dead process stays until its parent, the system's first one, has asked for its status."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def kill_everything(settings: Settings) -> None:
    server = postmaster(settings)
    processes = [server, *server.children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=PATIENCE_S)


async def setting(url: str, name: str) -> str:
    connection = await asyncpg.connect(url)
    try:
        return str(await connection.fetchval(f"SHOW {name}"))
    finally:
        await connection.close()


async def test_every_commit_is_durable(home: Settings) -> None:
    url = database_url(home)
    for name in ("fsync", "synchronous_commit", "full_page_writes"):
        assert await setting(url, name) == "on"


async def test_nobody_but_its_user_reaches_the_server(embedded_server: str) -> None:
    assert await setting(embedded_server, "listen_addresses") == ""
    assert await setting(embedded_server, "unix_socket_permissions") == "0700"


def test_url_of_the_operator_is_taken_as_it_is(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "never", database="postgresql://db.example/reelray")
    assert database_url(settings) == "postgresql://db.example/reelray"
    stop_embedded(settings)
    assert not settings.home.exists()


@pytest.fixture
def awkward_home() -> Iterator[Settings]:
    with embedded(f"it's a \"deep\" $HOME, isn't it/{'d' * 100}") as settings:
        yield settings


def test_processes_that_start_it_at_once_share_one_server_that_outlives_them(awkward_home: Settings) -> None:
    code = (
        "import sys; from pathlib import Path; from deployments.settings import Settings;"
        "from deployments.hosting.embedded_postgres import database_url;"
        "print(database_url(Settings(home=Path(sys.argv[1]))), flush=True);"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    starters = [
        subprocess.Popen([sys.executable, "-c", code, awkward_home.home], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    urls = {starter.communicate(timeout=PATIENCE_S)[0].strip() for starter in starters}
    assert {starter.returncode for starter in starters} == {-signal.SIGKILL}
    (url,) = urls
    assert asyncio.run(setting(url, "fsync")) == "on"
    assert database_url(awkward_home) == url


def test_owner_stops_it_and_twice_does_no_harm(home: Settings) -> None:
    url = database_url(home)
    stop_embedded(home)
    with pytest.raises(OSError, match=r"No such file|refused"):
        asyncio.run(setting(url, "fsync"))
    stop_embedded(home)


@pytest.mark.usefixtures("patient")
async def test_acknowledged_submit_survives_kill_9_of_the_database_and_the_store_recovers(home: Settings) -> None:
    store = await JobStore.open(database_url(home))
    kept = [await store.submit(NEW) for _ in range(20)]
    kill_everything(home)
    assert (home.home / "postgres" / "data" / "postmaster.pid").exists()
    assert await asyncio.to_thread(database_url, home)

    assert {(await store.get(job.id)).state for job in kept} == {JobState.QUEUED}  # type: ignore[union-attr]
    assert (await store.submit(NEW)).position == 20
    claim = await store.claims.take([NEW.endpoint], 60)
    assert claim is not None
    async with store.watch_lines(claim.job_id) as changes:
        async with asyncio.timeout(PATIENCE_S):
            while not await changes.changed(0.2):  # the listener needs a moment to reconnect
                await store.claims.log(claim, "still here")
    await store.close()


@pytest.mark.usefixtures("patient")
async def test_store_opened_while_the_database_is_away_waits_for_it(home: Settings) -> None:
    url = database_url(home)
    stop_embedded(home)
    opening = asyncio.create_task(JobStore.open(url))
    await asyncio.sleep(0.3)
    assert not opening.done()
    await asyncio.to_thread(database_url, home)
    await (await opening).close()


async def test_store_is_not_opened_on_a_database_that_stays_away(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.1)
    url = database_url(home)
    stop_embedded(home)
    with pytest.raises(StoreAway):
        await JobStore.open(url)


@pytest.mark.usefixtures("patient")
async def test_call_made_while_the_database_is_away_waits_for_it(home: Settings) -> None:
    store = await JobStore.open(database_url(home))
    stop_embedded(home)
    submission = asyncio.create_task(store.submit(NEW))
    await asyncio.sleep(0.3)
    assert not submission.done()
    await asyncio.to_thread(database_url, home)
    job = await submission
    assert job.position == 0
    await store.close()


async def test_database_that_stays_away_is_said_to_be_away(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.1)
    store = await JobStore.open(database_url(home))
    stop_embedded(home)
    with pytest.raises(StoreAway):
        await store.submit(NEW)
    await store.close()


@pytest.mark.usefixtures("patient")
async def test_no_submit_is_lost_or_doubled_when_the_database_is_killed_under_load(home: Settings) -> None:
    url = database_url(home)
    store = await JobStore.open(url)
    acknowledged = []

    async def submit() -> None:
        for _ in range(150):
            acknowledged.append((await store.submit(NEW)).id)

    async def work() -> int:
        closed = 0
        while closed < 40:
            try:
                claim = await store.claims.take([NEW.endpoint], 60)
                if claim is not None:
                    await store.claims.succeed(claim, {}, {})
                    closed += 1
            except LeaseLost:  # already committed before the crash, or swept
                pass
            await asyncio.sleep(0)
        return closed

    async def disturb() -> None:
        await asyncio.sleep(0.1)
        kill_everything(home)
        await asyncio.to_thread(database_url, home)

    await asyncio.gather(*(submit() for _ in range(4)), work(), disturb())
    connection = await asyncpg.connect(url)
    stored = [row["id"] for row in await connection.fetch("SELECT id FROM jobs")]
    succeeded = await connection.fetchval("SELECT count(*) FROM jobs WHERE state = 'succeeded'")
    ends = await connection.fetchval("SELECT count(*) FROM job_events WHERE state = 'succeeded'")
    await connection.close()
    await store.close()
    assert sorted(stored) == sorted(acknowledged)
    assert succeeded == ends >= 40


def test_pid_that_now_belongs_to_another_process_does_not_keep_it_from_starting(
    home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.hosting.embedded_postgres.RECYCLED_AFTER_S", 0.3)
    database_url(home)
    kill_everything(home)
    user = pwd.getpwnam(SERVICE_USER).pw_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "60"], user=user) as bystander:
        pid_file = home.home / "postgres" / "data" / "postmaster.pid"
        _, _, rest = pid_file.read_text().partition("\n")
        pid_file.write_text(f"{bystander.pid}\n{rest}")
        stop_embedded(home)
        assert database_url(home)
        assert bystander.poll() is None
        bystander.kill()


def test_server_too_busy_to_answer_keeps_its_pid_file_and_can_be_stopped(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    database_url(home)
    server = postmaster(home)
    monkeypatch.setattr("deployments.hosting.embedded_postgres.RECYCLED_AFTER_S", 0.0)
    monkeypatch.setattr("deployments.hosting.embedded_postgres.START_TIMEOUT_S", 1.0)
    with monkeypatch.context() as deaf:
        deaf.setattr("deployments.hosting.embedded_postgres._readiness", lambda folder: 2)
        with pytest.raises(PostgresFailed, match="another server might be running"):
            database_url(home)
        assert postmaster(home) == server
        stop_embedded(home)
    assert has_ended(server)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_whose_number_has_no_name_starts_it_too() -> None:
    code = (
        "import asyncio, os, sys; from pathlib import Path; import asyncpg; from deployments.settings import Settings;"
        "from deployments.hosting.embedded_postgres import database_url, stop_embedded;"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321);"  # late: root's own Python may be closed to others
        "settings = Settings(home=Path(sys.argv[1]));"
        "asyncio.run(asyncpg.connect(database_url(settings))); stop_embedded(settings)"
    )
    with TemporaryDirectory(prefix="reelray-") as home:
        os.chown(home, 54_321, 54_321)
        command, env = [sys.executable, "-c", code, home], {**os.environ, "HOME": "/"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_a_server_whose_service_is_killed_is_stopped(home: Settings) -> None:
    code = (
        "import sys, time; from pathlib import Path; from deployments.settings import Settings;"
        "from deployments.hosting.embedded_postgres import database_url; from deployments.hosting.guardian import guarded\n"
        "settings = Settings(home=Path(sys.argv[1]))\n"
        "with guarded(settings): print(database_url(settings), flush=True); time.sleep(3600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, home.home], stdout=subprocess.PIPE) as service:
        assert service.stdout is not None
        assert service.stdout.readline()
        server, [child] = postmaster(home), psutil.Process(service.pid).children()
        service.kill()
    psutil.wait_procs([child], PATIENCE_S)
    assert has_ended(server)
    assert not (home.home / "postgres" / "data" / "postmaster.pid").exists()


def test_a_server_that_a_new_service_has_taken_over_is_not_stopped_for_the_killed_one(home: Settings) -> None:
    with guarded(home):
        database_url(home)
        subprocess.run([sys.executable, "-m", guardian.__name__, home.home, "killed"], stdin=subprocess.DEVNULL, check=True)
        assert postmaster(home).is_running()


def test_a_guardian_waits_for_a_killed_service_to_let_go_of_its_lock(home: Settings) -> None:
    """The kernel closes a killed process's files in no order that one may count on."""
    database_url(home)
    command = [sys.executable, "-m", guardian.__name__, home.home, "killed"]
    with owner_file(home.home / "postgres").open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        print("killed", end="", file=owner, flush=True)
        waiting = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(2.0)
    assert waiting.wait(PATIENCE_S) == 0
    assert not (home.home / "postgres" / "data" / "postmaster.pid").exists()


def test_a_process_that_outlives_its_killed_service_does_not_start_the_server_again(
    home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray's workers do for some seconds."""
    with guarded(home):
        database_url(home)
        stop_embedded(home)
        database_url(home)
        stop_embedded(home)
    monkeypatch.setenv(GUARDED, "ended")
    with pytest.raises(PostgresFailed, match="has ended"):
        database_url(home)


def test_first_start_killed_halfway_starts_over() -> None:
    with embedded() as settings:
        partial = settings.home / "postgres" / "data.partial"
        partial.mkdir(parents=True)
        (partial / "PG_VERSION").write_text("18")
        assert database_url(settings)
        assert not partial.exists()
