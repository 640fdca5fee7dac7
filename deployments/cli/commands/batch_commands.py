"""`reelray batch ...`: renders the rows of a manifest, on this machine, as a Ray job, or through a running service."""

import os
import signal
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.shared import DEFAULT_CONFIG, Config, clear_errors, endpoint_named, errors, fail, print_line
from deployments.settings import load_settings

if TYPE_CHECKING:
    from deployments.batch.run_folder import Pool, RunFolder

batch = typer.Typer(help="Batch rendering: thousands of clips from a manifest.", no_args_is_help=True)

OutFolder = Annotated[str, typer.Argument(help="The folder or fsspec URL that was --out.")]
Address = Annotated[str | None, typer.Option(help="A Ray cluster's dashboard, e.g. http://head:8265; by default this machine.")]
ShardOption = Annotated[str, typer.Option(help="i/n: only every n-th row, from the i-th on. Others take the rest.")]
Follow = Annotated[bool, typer.Option(help="Show a Ray job's log until it ends.")]


@batch.command()
def submit(
    manifest: Annotated[str, typer.Argument(help="JSONL, CSV or Parquet: a path or an fsspec URL.")],
    endpoint: Annotated[str, typer.Option(help="E.g. controlnext.")],
    out: Annotated[str, typer.Option(help="Where everything goes: a folder, or an fsspec URL such as s3://bucket/run-7.")],
    address: Address = None,
    through_service: Annotated[str | None, typer.Option(help="The URL of a service whose replicas do the work.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Rows that are denoised at a time, or that the service has.")] = 1,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="field=value, in all rows.")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="field=0..9 or field=a,b: every row with each of them.")] = None,
    shard: ShardOption = "1/1",
    skip_invalid: Annotated[bool, typer.Option(help="Render the other rows where some are invalid.")] = False,
    changed_manifest: Annotated[bool, typer.Option(help="The manifest has changed: render what differs.")] = False,
    max_failures: Annotated[int, typer.Option(min=0, help="With more failed rows the exit status is 1.")] = 0,
    contact_sheet: Annotated[bool, typer.Option(help="Make one picture of all first frames.")] = False,
    follow: Follow = False,
    prepare_only: Annotated[bool, typer.Option(help="Only write the run's folder: something else will start the run.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Check a manifest, then render its rows. The same command goes on with a run that was interrupted."""
    from deployments.batch.manifest import Manifest, Variation
    from deployments.batch.prepare import RowsRefused, prepare
    from deployments.batch.run_folder import Run, RunFolder, settings_for

    described, settings = endpoint_named(endpoint), load_settings(config)
    with clear_errors():
        folder = RunFolder(out)
        run = Run(
            described.id,
            rows=0,
            digest="",
            settings=settings_for(described, settings, here=address is None and folder.is_local),
            pools=_pools(concurrency, on_gpu=settings.model_configs()[described.model].on_gpu),
            service=through_service,
            concurrency=concurrency,
            max_failures=max_failures,
            contact_sheet=contact_sheet,
        )
        variation = Variation.parsed(overrides or (), sweep or ())
        try:
            prepared = prepare(
                folder, Manifest(manifest, described, variation), run, skip_invalid=skip_invalid, changed=changed_manifest
            )
        except RowsRefused as exc:
            for problem in exc.problems:
                fail(f"row {problem.number}: {problem.message}")
            raise typer.Exit(fail(exc.message)) from exc
        for problem in prepared.problems:
            fail(f"row {problem.number} is left out: {problem.message}")
        if prepare_only:
            print_line(f"{prepared.run.rows} rows are ready in {folder.url}")
        else:
            _start(folder, address, shard, follow=follow)


@batch.command()
def resume(out: OutFolder, address: Address = None, shard: ShardOption = "1/1", follow: Follow = False) -> None:
    """Go on with a run: render what is missing."""
    from deployments.batch.run_folder import RunFolder

    with clear_errors():
        folder = RunFolder(out)
        folder.run()
        _start(folder, address, shard, follow=follow)


@batch.command()
def status(out: OutFolder) -> None:
    """Show how far a run is, from any machine that reaches its folder."""
    from deployments.batch.progress import all_progress
    from deployments.batch.run_folder import RunFolder

    with clear_errors():
        folder = RunFolder(out)
        run = folder.run()
        print_line(f"{run.endpoint}, {run.rows} rows")
        for name, now in all_progress(folder).items():
            print_line(f"{name}: {now.line()}")


@batch.command()
def logs(out: OutFolder, follow: Follow = False) -> None:
    """Show what a run's Ray job has said."""
    from deployments.batch.ray_job import RayJob
    from deployments.batch.run_folder import RunFolder

    with clear_errors():
        if (job := RayJob.of(RunFolder(out))) is None:
            raise typer.Exit(fail("It is no Ray job: what it says is shown where it runs."))
        if follow:
            job.follow(_told)
        else:
            _told(job.logs())


@batch.command()
def stop(out: OutFolder) -> None:
    """Stop a run. `reelray batch resume` goes on with it."""
    from deployments.batch.progress import all_progress
    from deployments.batch.ray_job import RayJob
    from deployments.batch.run_folder import RunFolder

    with clear_errors():
        folder = RunFolder(out)
        running = [now for now in all_progress(folder).values() if now.is_running]
        if (job := RayJob.of(folder)) is not None and not job.has_ended:
            job.stop()
            print_line(f"{job.submission_id} is told to stop")
        elif not running:
            raise typer.Exit(fail("It is not running."))
        for now in running:
            if now.host == socket.gethostname():
                os.kill(now.pid, signal.SIGTERM)
                print_line(f"process {now.pid} is told to stop")
            elif job is None:
                fail(f"stop it on {now.host}, where it is process {now.pid}")


def _start(folder: "RunFolder", address: str | None, shard: str, *, follow: bool) -> None:
    from deployments.batch.driver import Shard, run_and_exit

    part = Shard.parsed(shard)
    if address is None:
        raise typer.Exit(run_and_exit(folder, part, errors))
    from deployments.batch.ray_job import RayJob

    job = RayJob.submit(folder, address, ["--shard", shard] if part.count > 1 else [])
    print_line(job.submission_id)
    if follow:
        job.follow(_told)
        raise typer.Exit(job.exit_status())


def _told(text: str) -> None:
    errors.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def _pools(concurrency: int, *, on_gpu: bool) -> "dict[str, Pool]":
    """One process of the other stages keeps up with four that denoise. On GPUs the three share one by fractions, as in
    `cluster/`."""
    from deployments.batch.run_folder import Pool

    shares = (
        {"preprocess": 0.2, "denoise": 0.6, "decode": 0.2} if on_gpu else dict.fromkeys(("preprocess", "denoise", "decode"), 0.0)
    )
    others = -(-concurrency // 4)
    most = {"preprocess": others, "denoise": concurrency, "decode": others}
    return {stage: Pool(1, most[stage], gpus) for stage, gpus in shares.items()}
