"""What a plan's key depends on, and how plans are found or built. A few tests use TensorRT-RTX, the others `fake_tensorrt`."""

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from engines.animatediff.call import motion_call
from engines.animatediff.checkpoint import load_unet
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.backends.shapes import ShapeFamily
from engines.backends.trt import build, plans
from engines.backends.trt.build import BuildOptions
from engines.backends.trt.cache import REFITTABLE, PlanCache, PlanKey
from engines.backends.trt.plans import TRACERS, load_engine, plan_key, plan_of
from engines.backends.trt.runner import TensorRTEngine
from engines.backends.unet_call import UNetCall
from engines.errors import EngineError
from tests.engines.backends.trt.fake_tensorrt import FakeStream, fake_plan, fake_tensorrt
from tests.engines.backends.trt.keys import KEY
from tests.engines.backends.trt.scaled import FAMILIES, FIXED, inputs_of, scaled_call

GPU = KEY.gpu
PLAIN = BuildOptions()
REFIT = BuildOptions(refit=True)
CHANGED_OPTIONS = {
    "refit": True,
    "optimization_level": 5,
    "workspace_bytes": 2**30,
    "detailed": False,
    "compute_capability": "SM89",
    "plugins": ("temporal_attention",),
}
TRACED_OF_ANIMATEDIFF = [
    "engines/animatediff/call.py",
    "engines/animatediff/nets/layers.py",
    "engines/animatediff/nets/unet.py",
    "engines/diffusion/layers.py",
    "engines/backends/shapes.py",
    "engines/backends/unet_call.py",
    "engines/backends/trt/build.py",
    "engines/backends/trt/export.py",
    "engines/backends/trt/plugin.py",
    "engines/backends/trt/profiles.py",
    "engines/backends/trt/ptx.py",
    "kernels/attention.py",
    "kernels/triton/temporal_attention.py",
]
NOT_TRACED = ["engines/pipeline.py", "engines/errors.py", "engines/animatediff/decode.py", "engines/controlnext/nets/unet.py"]


def key_of(call: UNetCall, options: BuildOptions = PLAIN) -> PlanKey:
    return plan_key(call, FAMILIES, fake_tensorrt(), GPU, options)


@pytest.fixture(scope="module")
def motion(demo_weights: AnimateDiffWeights) -> UNetCall:
    return motion_call(load_unet(AnimateDiffConfig(weights=demo_weights)), halves=2)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of our sources that may be changed."""
    for package in plans._OURS:
        shutil.copytree(package, tmp_path / "src" / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(plans, "_ROOT", tmp_path / "src")
    plans._sources_hash.cache_clear()
    yield tmp_path / "src"
    plans._sources_hash.cache_clear()


def test_equal_modules_have_equal_keys(motion: UNetCall, demo_weights: AnimateDiffWeights):
    again = motion_call(load_unet(AnimateDiffConfig(weights=demo_weights)), halves=2)
    assert key_of(motion) == key_of(again)
    assert key_of(motion).precision == "float32"


def test_library_gpu_and_families_are_in_the_key(motion: UNetCall):
    key = key_of(motion)
    assert (key.library, key.version, key.gpu) == ("tensorrt", "11.4.0.106", GPU)
    assert plan_key(motion, FAMILIES, fake_tensorrt("11.2.1"), GPU, PLAIN).version == "11.2.1"
    assert plan_key(motion, FAMILIES[::-1], fake_tensorrt(), GPU, PLAIN).profiles == key.profiles[::-1] != key.profiles


def test_every_option_is_in_the_key():
    assert set(CHANGED_OPTIONS) == {field.name for field in fields(BuildOptions)}
    call = scaled_call()
    keys = [key_of(call), *(key_of(call, replace(PLAIN, **{name: value})) for name, value in CHANGED_OPTIONS.items())]
    assert len({key.digest for key in keys}) == len(keys)
    assert len({key.flags for key in keys}) == len(keys)


def change(source: Path) -> None:
    plans._sources_hash.cache_clear()
    with source.open("a") as file:
        file.write("# changed\n")


def test_another_source_that_shapes_the_graph_is_another_plan(motion: UNetCall, sources: Path):
    keys = {key_of(motion).digest}
    for count, path in enumerate(TRACED_OF_ANIMATEDIFF, start=2):
        change(sources / path)
        keys.add(key_of(motion).digest)
        assert len(keys) == count, path


def test_a_source_that_does_not_shape_the_graph_is_not_in_the_key(motion: UNetCall, sources: Path):
    before = key_of(motion)
    for path in NOT_TRACED:
        change(sources / path)
        assert key_of(motion) == before, path


@pytest.mark.parametrize("name", [*TRACERS, "triton"])
def test_another_version_of_a_tracer_is_another_plan(name: str, monkeypatch: pytest.MonkeyPatch):
    before = key_of(scaled_call())
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda asked: "0.0" if asked == name else real(asked))
    assert key_of(scaled_call()).digest != before.digest


def test_without_the_exporter_there_is_no_key(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EngineError, match=r"torch is not installed.*reelray\[gpu\]"):
        key_of(scaled_call())


@pytest.mark.parametrize(
    "other",
    [
        replace(scaled_call(), name="scaled-2"),
        replace(scaled_call(), multiple=4),
        replace(scaled_call(), dims={**scaled_call().dims, "time": ("frames", 3)}),
        scaled_call(dtype=torch.float16),
        scaled_call(3.0),
    ],
    ids=["name", "multiple", "dims", "dtype", "weight"],
)
def test_another_call_is_another_plan(other: UNetCall):
    assert key_of(other).digest != key_of(scaled_call()).digest


class Net(nn.Module):
    """A module with every kind of state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)
        self.heads = 2
        self.sizes = [1, 2]
        self.act = torch.relu
        self.table = torch.zeros(3)
        self.register_buffer("position", torch.zeros(3), persistent=False)


def net_call(**attributes: object) -> UNetCall:
    torch.manual_seed(0)
    net = Net()
    for name, value in attributes.items():
        setattr(net, name, value)
    return replace(scaled_call(), module=net)


@pytest.mark.parametrize(
    ("part", "attributes"),
    [
        ("graph", {"heads": 4}),
        ("graph", {"sizes": [2, 1]}),
        ("graph", {"act": torch.sigmoid}),
        ("graph", {"conv": nn.Identity()}),
        ("graph", {"extra": None}),
        ("weights", {"table": torch.ones(3)}),
        ("weights", {"position": torch.ones(3)}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_no_state_dict_holds_is_in_the_key(part: str, attributes: dict[str, object]):
    assert getattr(key_of(net_call(**attributes)), part) != getattr(key_of(net_call()), part)


def test_plans_to_be_refitted_are_found_whatever_the_weights():
    two, three = (key_of(scaled_call(weight), REFIT) for weight in (2.0, 3.0))
    assert two == three
    assert two.weights == REFITTABLE


class Exporter:
    """Stands in for `export_onnx`: writes a file for the fake library, and counts the exports."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.plugins: list[tuple[Sequence[str], int]] = []

    def __call__(self, call: UNetCall, path: Path, plugins: Sequence[str], frames: int) -> None:
        self.paths.append(path)
        self.plugins.append((plugins, frames))
        weight = float(call.module.weight)
        path.write_text(json.dumps(fake_plan(call, (), weight)))


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    made = Exporter()
    monkeypatch.setattr(plans, "export_onnx", made)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


def test_a_plan_is_exported_and_built_once_and_its_export_does_not_stay(exporter: Exporter, cache: PlanCache):
    call = scaled_call()
    first = plan_of(call, FAMILIES, fake_tensorrt(), cache, GPU, PLAIN)
    assert plan_of(call, FAMILIES, fake_tensorrt(), cache, GPU, PLAIN) == first
    (path,) = exporter.paths
    assert not path.parent.exists()


def test_a_build_that_fails_leaves_no_export(exporter: Exporter, cache: PlanCache):
    with pytest.raises(EngineError, match="does not fit the UNet"):
        plan_of(scaled_call(), [ShapeFamily.fixed(4, 9, 8)], fake_tensorrt(), cache, GPU, PLAIN)
    assert not any(path.parent.exists() for path in exporter.paths)


def test_builds_hand_their_timings_on(exporter: Exporter, cache: PlanCache):
    for count, weight in enumerate((2.0, 3.0), 1):
        plan_of(scaled_call(weight), FAMILIES, fake_tensorrt(), cache, GPU, PLAIN)
        assert cache.timings(key_of(scaled_call()).timings) == b"+" * count


def test_an_engine_comes_with_the_modules_weights(exporter: Exporter, cache: PlanCache):
    for weight in (2.0, 3.0, 2.0):
        call = scaled_call(weight)
        inputs = inputs_of(call, FIXED.best)
        engine = load_engine(call, FAMILIES, fake_tensorrt(), cache, FakeStream(), GPU, PLAIN)
        torch.testing.assert_close(engine(inputs), call.module(*inputs.values()))
    assert len(exporter.paths) == 2, "the third plan is found in the cache"


def test_an_engine_to_be_refitted_comes_with_the_modules_weights_from_anybodys_plan(exporter: Exporter, cache: PlanCache):
    for weight in (2.0, 3.0):
        call = scaled_call(weight)
        inputs = inputs_of(call, FIXED.best)
        engine = load_engine(call, FAMILIES, fake_tensorrt(), cache, FakeStream(), GPU, REFIT)
        torch.testing.assert_close(engine(inputs), call.module(*inputs.values()))
    assert len(list(cache.folder.glob("*.plan"))) == 1


def test_a_plan_with_plugins_is_exported_for_its_families_number_of_frames(
    exporter: Exporter, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build, "register", lambda: None)
    call, options = scaled_call(dtype=torch.float16), BuildOptions(plugins=("temporal_attention",))
    plan_of(call, [FIXED], fake_tensorrt(), cache, GPU, options)
    assert exporter.plugins == [(("temporal_attention",), FIXED.best.frames)]
    with pytest.raises(EngineError, match=r"one number of frames, not for \[2, 4, 6\]"):
        plan_of(call, FAMILIES, fake_tensorrt(), cache, GPU, options)
    with pytest.raises(EngineError, match=r"one number of frames, not for \[2, 4, 6\]"):
        load_engine(call, FAMILIES, fake_tensorrt(), cache, FakeStream(), GPU, replace(options, refit=True))
    assert len(exporter.paths) == 1, "refused before an export"


def test_plugins_are_another_plan_and_change_with_their_kernels(sources: Path):
    def key() -> PlanKey:
        plans._sources_hash.cache_clear()
        return key_of(scaled_call(), BuildOptions(plugins=("temporal_attention",)))

    before = key()
    assert before.digest != key_of(scaled_call()).digest
    assert before.triton == metadata.version("triton")
    with (sources / "kernels/triton/ahead.py").open("a") as file:
        file.write("# changed\n")
    assert key().plugins != before.plugins


def test_tensorrt_rtx_builds_the_real_export_once(cache: PlanCache, monkeypatch: pytest.MonkeyPatch):
    library: ModuleType = pytest.importorskip("tensorrt_rtx", reason="no tensorrt_rtx: not verified that it builds a real export")
    options = BuildOptions(compute_capability="SM89")
    call = scaled_call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about its own deprecations
        built = plan_of(call, FAMILIES, library, cache, GPU, options)
    assert built
    monkeypatch.setattr(plans, "export_onnx", None)
    assert plan_of(call, FAMILIES, library, cache, GPU, options) == built


def test_tensorrt_rtx_says_why_a_plan_cannot_be_loaded():
    library: ModuleType = pytest.importorskip(
        "tensorrt_rtx", reason="no tensorrt_rtx: not verified that its message is quoted for a plan that fails"
    )
    with pytest.raises(EngineError, match=r"the plan cannot be loaded: .*Error Code \d"):
        TensorRTEngine(b"no plan", library, scaled_call(), FAMILIES, FakeStream())
