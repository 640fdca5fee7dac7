"""Works a run off: rows that have ended are left alone, the others go to Ray Data or to a running service, and the results are
written.

    python -m deployments.batch <the run's folder> [--shard i/n]

The exit status is 1 if more than `max_failures` rows failed, and 2 if the run could not go on. SIGTERM and Ctrl-C stop it; the
same command goes on.
"""

import asyncio
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

from rich.console import Console

from deployments.batch.contact_sheet import write_contact_sheet
from deployments.batch.enqueue import Enqueue
from deployments.batch.laps import in_laps
from deployments.batch.progress import Reporter, Snapshot, read_progress
from deployments.batch.records import Ended, write_results
from deployments.batch.run_folder import Row, Run, RunFolder
from engines.errors import ReelrayError
from engines.temporary import temporary_folder


class AtWork(ReelrayError):
    """Another process works on the run."""


class NoShard(ReelrayError):
    """A shard is given as i/n: the second of four is 2/4."""


@dataclass(frozen=True)
class Shard:
    """Every `count`-th row, from the `index`-th on, which counts from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parsed(cls, text: str) -> Self:
        """From i/n. Raises `NoShard`."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise NoShard
        return cls(int(index), int(count))

    @property
    def progress(self) -> str:
        """The name of its progress in the run's folder."""
        return "progress.json" if self.count == 1 else f"progress-{self.index}-of-{self.count}.json"

    def rows(self, folder: RunFolder) -> Iterator[Row]:
        """Its rows of a run."""
        return (row for place, row in enumerate(folder.rows()) if place % self.count == self.index - 1)


def work_off(folder: RunFolder, shard: Shard, console: Console) -> Snapshot:
    """Renders what is missing and writes the results. Returns how far it got. Raises `ReelrayError` if it cannot go on."""
    run = folder.run()
    other = read_progress(folder, shard.progress)
    if other is not None and other.is_running:
        raise AtWork(f"Process {other.pid} of {other.host} works on this run.")
    ended = Ended(folder)
    statuses = [ended.status(row) for row in shard.rows(folder)]
    try:
        with Reporter(folder, shard.progress, len(statuses), console) as reporter:
            reporter.begin(statuses.count("done"), statuses.count("refused"))
            rows = _cleared((row for row in shard.rows(folder) if ended.status(row) is None), ended)
            asyncio.run(_work_off(folder, run, rows, reporter))
    finally:
        with temporary_folder() as place:
            write_results(folder, place)
        if run.contact_sheet:
            write_contact_sheet(folder)
    return reporter.now


async def _work_off(folder: RunFolder, run: Run, rows: Iterator[Row], reporter: Reporter) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    made = in_laps(folder, rows) if run.service is None else Enqueue(folder, run, run.service).records(rows)
    async with aclosing(made) as records:
        async for record in records:
            reporter.ended(record)


def _cleared(rows: Iterable[Row], ended: Ended) -> Iterator[Row]:
    for row in rows:
        ended.clear(row)
        yield row


def run_and_exit(folder: RunFolder, shard: Shard, console: Console) -> int:
    """The exit status of a driver, which has said what happened."""
    try:
        now = work_off(folder, shard, console)
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("stopped; the same command goes on", markup=False)
        return 130
    except ReelrayError as exc:
        console.print(exc.message, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(
        f"{now.line()}; results.jsonl, results.parquet and the videos are in {folder.url}", markup=False, soft_wrap=True
    )
    return int(now.failed > folder.run().max_failures)


def main() -> None:
    """See above."""
    url, *rest = sys.argv[1:]
    shard = Shard.parsed(rest[-1]) if rest else Shard()
    sys.exit(run_and_exit(RunFolder(url), shard, Console(stderr=True)))
