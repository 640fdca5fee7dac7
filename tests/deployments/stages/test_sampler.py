"""Samplers and denoise replicas with the real tiny models, in one process."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments import metrics, tracing
from deployments.hosting.demo_weights import demo_inputs
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from deployments.stages.denoise import Denoise
from deployments.stages.protocol import CheckpointRef, Done, Note, Started, UnitCall
from deployments.stages.sampler import Sampler
from deployments.stages.unit_pool import MOST_LOSSES
from engines.errors import GenerationFailed, RunnerDisconnected, RunnerFailed
from engines.registry import build_stage
from engines.spec import Latents
from engines.units import DenoiseStage, Steps
from tests.engines.controlnext.conftest import conditioning
from tests.fakes import ENDPOINT, LocalReplicas, done_of

CONTROLNEXT = "fal-ai/controlnext"
STEPS = 3
ASKED = conditioning(13)
UNITS = 3 * 2
"""Of a step of `ASKED`: windows, halves."""
FIRST, AGAIN = (CheckpointRef("checkpoints/0190aaaa-0000-7000-8000-000000000002", used=used) for used in (False, True))


@pytest.fixture(scope="module")
def nets(demo_settings: Settings) -> list[DenoiseStage]:
    """What three replicas hold of ControlNeXt."""
    config = demo_settings.model_configs()["controlnext"]
    return [build_stage("controlnext", "denoise", replace(config, threads=1)) for _ in range(3)]


@pytest.fixture(scope="module")
def alone(nets: list[DenoiseStage]) -> torch.Tensor:
    """The latents of `ASKED`, by one process."""
    return nets[0].sample(ASKED).values


@pytest.fixture
def held(nets: list[DenoiseStage], demo_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[Denoise]:
    """Three replicas."""
    left = iter(nets)
    monkeypatch.setattr("deployments.stages.denoise.build_stage", lambda *_: next(left))
    return [Denoise("controlnext", demo_settings.model_configs()["controlnext"]) for _ in nets]


class System:
    """A sampler and its replicas."""

    def __init__(
        self, settings: Settings, files: Path, *replicas: Denoise, endpoint: str = CONTROLNEXT, checkpoint_s: float = 1e-6
    ):
        self.model = ENDPOINTS[endpoint].model
        self.config = settings.model_configs()[self.model]
        self.files, self.checkpoint_s = str(files), checkpoint_s
        self.replicas = LocalReplicas(*replicas)
        self.sampler = self.new_sampler()

    def new_sampler(self) -> Sampler:
        return Sampler(self.model, self.config, self.files, 1e-6, self.replicas)

    async def latents(self, asked: Any = ASKED, checkpoint: CheckpointRef = FIRST) -> torch.Tensor:
        return (await self.done(asked, checkpoint)).product.values

    async def done(self, asked: Any = ASKED, checkpoint: CheckpointRef = FIRST) -> Done[Latents]:
        async with asyncio.timeout(60):
            return await done_of(self.sampler.run(asked, asked, checkpoint), nothing)

    async def until_step(self, step: int, asked: Any = ASKED, checkpoint: CheckpointRef = FIRST) -> list[str]:
        """Listens until a step is done, then hangs up. Returns what was told."""
        told = []
        async with aclosing(self.sampler.run(asked, asked, checkpoint)) as stream:
            async for item in stream:
                told.append(item.message if isinstance(item, Note) else "")
                if isinstance(item, Note) and item.progress and item.progress.at.done == step:
                    break
        return told

    @property
    def at_rest(self) -> bool:
        return self.sampler.pool.scheduler.at_rest and not any(
            replica._kept or replica._running for replica in self.replicas.alive.values()
        )

    async def rested(self) -> None:
        async with asyncio.timeout(10):
            while not self.at_rest:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def nothing(_: object) -> None:
    pass


@pytest.fixture
def system(demo_settings: Settings, held: list[Denoise], tmp_path: Path) -> Callable[..., System]:
    return lambda replicas=2, **options: System(demo_settings, tmp_path / "files", *held[:replicas], **options)


@pytest.mark.parametrize("replicas", [1, 2, 3])
async def test_any_number_of_replicas_gives_the_bits_of_one_process(
    system: Callable[..., System], alone: torch.Tensor, replicas: int
):
    one = system(replicas)
    done = await one.done()
    assert torch.equal(done.product.values, alone)
    used = Counter(name for name, _ in one.replicas.ran)
    assert len(used) == replicas
    assert UNITS * STEPS <= used.total() <= UNITS * STEPS + 2, "on a busy machine one may straggle"
    assert (done.width, done.product.engine) == (UNITS, "eager")
    assert 0 < done.busy_s <= replicas * done.seconds * 1.2
    assert (done.receipt["units"], done.gpu_seconds) == (STEPS * UNITS, 0)
    assert 1 <= done.receipt["replicas"] <= replicas
    assert done.receipt["replica_seconds"] == pytest.approx(done.busy_s, abs=1e-6)
    assert one.replicas.fetched == Counter(dict.fromkeys(used, 1)), "the conditioning travels once per job and replica"
    await one.rested()


async def test_a_jobs_trace_has_a_span_of_the_sampler_and_one_for_each_replica(system: Callable[..., System]):
    exporter = InMemorySpanExporter()
    tracing.process_with(SimpleSpanProcessor(exporter), "sampler")
    try:
        with tracing.span("denoise", None, begins=True):
            trace = tracing.current()
            one = system(2)
            await one.done()
    finally:
        tracing.stop_export()
    assert trace is not None
    made = exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in made} == {tracing.trace_id(trace)}
    (sample,) = [span for span in made if span.name == "sample"]
    (denoise,) = [span for span in made if span.name == "denoise"]
    units = [span for span in made if span.name == "units"]
    assert len(made) == 2 + len(units)
    assert sample.parent.span_id == denoise.context.span_id
    assert {span.parent.span_id for span in units} == {sample.context.span_id}
    assert {span.attributes["replica"] for span in units} == {name for name, _ in one.replicas.ran}
    assert sum(span.attributes["units"] for span in units) == sample.attributes["units"] == UNITS * STEPS
    assert all(sample.start_time - 1e6 <= span.start_time < span.end_time <= sample.end_time for span in units)
    assert {call.traceparent.split("-")[2] for _, call in one.replicas.ran} == {f"{sample.context.span_id:016x}"}


async def test_units_that_are_given_to_another_replica_are_counted_with_the_reason(system: Callable[..., System]):
    recorded: list[tuple[str, Mapping[str, str]]] = []

    def export(metric: metrics.Metric, value: float, tags: Mapping[str, str]) -> None:
        recorded.append((metric.name, tags))

    one = system(3)

    def kill(replica: str, call: UnitCall) -> None:
        if replica == "replica-1" and len(one.replicas.ran) > UNITS:
            asyncio.get_running_loop().call_soon(one.replicas.kill, "replica-1")
            one.replicas.on_unit = lambda *_: None

    one.replicas.on_unit = kill
    metrics.export_to(export)
    try:
        await one.done()
    finally:
        metrics.stop_export(export)
    names = Counter(name for name, _ in recorded)
    assert names[metrics.UNIT.name] == names[metrics.UNIT_WAIT.name] == UNITS * STEPS
    reasons = Counter(tags["reason"] for name, tags in recorded if name == metrics.UNITS_AGAIN.name)
    assert 1 <= reasons["lost"] <= 2, "those that were at it"
    assert reasons.keys() <= {"lost", "straggler", "moved"}
    assert {tags["endpoint"] for _, tags in recorded} == {CONTROLNEXT}


async def test_jobs_side_by_side_have_their_own_bits(system: Callable[..., System], held: list[Denoise], alone: torch.Tensor):
    one, other = system(2), conditioning(7, seed=9, num_inference_steps=2)
    names = [CheckpointRef(f"checkpoints/0190aaaa-0000-7000-8000-00000000001{n}", used=False) for n in range(2)]
    found = await asyncio.gather(one.latents(ASKED, names[0]), one.latents(other, names[1]))
    assert torch.equal(found[0], alone)
    assert torch.equal(found[1], held[0].stage.sample(other).values)
    await one.rested()


async def test_a_replica_killed_within_a_step_costs_its_units_in_flight_and_no_bit(
    system: Callable[..., System], alone: torch.Tensor
):
    one = system(3)

    killed = list[str]()

    def kill(replica: str, call: UnitCall) -> None:
        if len(one.replicas.ran) >= UNITS + 2 and not killed:
            killed.append("replica-1")
            asyncio.get_running_loop().call_soon(one.replicas.kill, "replica-1")

    one.replicas.on_unit = kill
    assert torch.equal(await one.latents(), alone)
    assert one.replicas.begun <= UNITS * STEPS + 4
    assert "replica-1" not in one.replicas.alive
    await one.rested()


async def test_work_goes_on_at_replicas_that_come_while_others_leave(
    system: Callable[..., System], held: list[Denoise], alone: torch.Tensor
):
    one, drained_at = system(1), list[int]()

    def change(replica: str, call: UnitCall) -> None:
        if len(one.replicas.ran) >= 2 and "new" not in one.replicas.alive:
            one.replicas.add("new", held[1])
        if len(one.replicas.ran) >= UNITS + 1 and not one.replicas.drained:
            one.replicas.drain("replica-0")
            drained_at.append(len(one.replicas.ran))

    one.replicas.on_unit = change
    assert torch.equal(await one.latents(), alone)
    order = [name for name, _ in one.replicas.ran]
    assert "new" in order[:UNITS], "within the step in which it came"
    assert order[drained_at[0] :].count("replica-0") <= 2 + 1, "those that were there, and the one that is being sent"
    assert len(order) <= UNITS * STEPS + 2, "a drained replica's last answers count"


async def test_without_replicas_a_job_waits_and_asks_for_one(
    system: Callable[..., System], held: list[Denoise], alone: torch.Tensor
):
    one = system(0)
    stream = one.sampler.run(ASKED, ASKED, FIRST)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.05)
    assert not first.done(), "its turn has not come"
    assert one.replicas.wanted
    one.replicas.add("new", held[0])
    assert await first == Started()
    *_, item = [item async for item in stream]
    assert isinstance(item, Done)
    assert torch.equal(item.product.values, alone)


async def test_after_the_loss_of_the_sampler_another_goes_on_at_the_last_step(system: Callable[..., System], alone: torch.Tensor):
    one = system(2)
    await one.until_step(2)
    await one.rested()
    before = len(one.replicas.ran)
    one.sampler = one.new_sampler()
    told = list[str]()

    async def hear(item: Any) -> None:
        told.append(getattr(item, "message", ""))

    done = await done_of(one.sampler.run(ASKED, ASKED, AGAIN), hear)
    assert torch.equal(done.product.values, alone)
    assert "resumed at step 2/3" in told
    assert before <= 2 * UNITS + 4, "what ran when the sampler was lost"
    assert UNITS <= len(one.replicas.ran) - before <= UNITS + 2


async def test_an_attempt_whose_dispatcher_died_makes_way_for_the_next(system: Callable[..., System], alone: torch.Tensor):
    one = system(2)
    orphan = asyncio.ensure_future(one.done())
    async with asyncio.timeout(10):
        while len(one.replicas.ran) < UNITS + 1:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert torch.equal(await one.latents(checkpoint=AGAIN), alone)
    with pytest.raises(RunnerDisconnected):
        await orphan
    assert one.replicas.begun <= UNITS * STEPS + 2 * UNITS, "its step in hand is done again"
    await one.rested()


async def test_a_cancel_frees_every_replica_within_one_unit(system: Callable[..., System]):
    one, running = system(2), Counter[int]()
    hooks = [
        replica.stage.unet.register_forward_pre_hook(lambda *_: running.update([1]))  # type: ignore[attr-defined]
        for replica in one.replicas.alive.values()
    ]
    try:
        await one.until_step(1)
        at_cancel = running.total()
        await one.rested()
        assert running.total() <= at_cancel + 2, "a call of a net that ran at each replica, at most"
    finally:
        for hook in hooks:
            hook.remove()


async def test_a_unit_that_ends_every_replica_is_given_up(system: Callable[..., System]):
    one, names = system(3), list[str]()

    def kill(replica: str, call: UnitCall) -> None:
        if call.unit.keeps == 0:
            names.append(replica)
            asyncio.get_running_loop().call_soon(one.replicas.kill, replica)
            asyncio.get_running_loop().call_soon(one.replicas.add, f"after {replica}", one.replicas.alive[replica])

    one.replicas.on_unit = kill
    with pytest.raises(RunnerDisconnected):
        await one.done()
    assert len(names) == MOST_LOSSES
    await one.rested()


@pytest.mark.parametrize(("error", "told"), [(GenerationFailed, GenerationFailed), (RuntimeError, RunnerFailed)])
async def test_a_units_error_is_its_jobs(
    system: Callable[..., System],
    held: list[Denoise],
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    told: type[Exception],
):
    def fail(_: Any) -> None:
        raise error("at 10.0.0.7")

    one = system(1)
    with monkeypatch.context() as patched:
        patched.setattr(held[0].stage, "begin", fail)
        with pytest.raises(told):
            await one.done()
    assert (await one.done()).product.engine == "eager", "the replica is of use as before"
    await one.rested()


async def test_a_replica_that_cannot_be_reached_for_a_moment_is_used_again(
    system: Callable[..., System], alone: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deployments.stages.unit_pool.AGAIN_S", 0.01)
    one, failed = system(1), list[int]()

    def unreachable(replica: str, call: UnitCall) -> None:
        if len(one.replicas.ran) == 3 and not failed:
            failed.append(1)
            raise RunnerDisconnected

    one.replicas.on_unit = unreachable
    assert torch.equal(await one.latents(), alone)
    assert failed


async def test_a_request_of_one_unit_goes_on_elsewhere_at_a_step_that_it_reported(demo_settings: Settings, tmp_path: Path):
    config = replace(demo_settings.model_configs()[ENDPOINTS[ENDPOINT].model], threads=1)
    both = [Denoise(ENDPOINTS[ENDPOINT].model, config) for _ in range(2)]
    one = System(demo_settings, tmp_path, *both, endpoint=ENDPOINT)
    asked = await _animatediff(demo_settings, steps=8)
    whole = both[0].stage.sample(asked).values
    started, going = list[int](), threading.Event()

    def note(replica: str, call: UnitCall) -> None:
        assert isinstance(call.unit, Steps)
        started.append(call.unit.start.step if call.unit.start else 0)

    one.replicas.on_unit = note
    steps = list[int]()

    async def hear(item: Any) -> None:
        if isinstance(item, Note) and item.progress:
            steps.append(item.progress.at.done)
            if item.progress.at.done >= 3 and not going.is_set():
                going.set()
                one.replicas.kill(next(name for name, calls in one.replicas.calls.items() if calls))

    async with asyncio.timeout(30):
        done = await done_of(one.sampler.run(asked, asked, FIRST), hear)
    assert torch.equal(done.product.values, whole)
    assert steps == sorted(steps)
    assert started[0] == 0
    assert len(started) == 2
    assert started[1] >= 3, "nothing that was reported is done again"


async def _animatediff(settings: Settings, steps: int) -> Any:
    from deployments.stages.preprocess import Preprocess

    endpoint = ENDPOINTS[ENDPOINT]
    replica = Preprocess(endpoint, settings.model_configs()[endpoint.model], settings.fetch, settings.files_url)
    return (await done_of(replica.run(demo_inputs()[ENDPOINT] | {"num_inference_steps": steps}), nothing)).product
