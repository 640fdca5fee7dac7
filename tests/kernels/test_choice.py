import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention, choice, geglu
from kernels.bench import Result, append
from kernels.choice import INDUCTOR, chosen, forced, prefers_kernel, record_of, records_in, winners
from kernels.triton import flash_attention, group_norm_silu, layer_norm, residual_blend
from kernels.triton import geglu as geglu_triton
from kernels.triton import temporal_attention as temporal

GPU = "NVIDIA H200"
SITE = (4096, 4096, 8, 40)
TILES = ("wide", "narrow")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file for measurements of a GPU that is not present."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    with records_in(tmp_path):
        yield record_of(GPU)


def measured(path: Path, ours: dict[str, float], theirs: dict[str, float], dtype: str = "float16") -> None:
    runs = json.loads(path.read_text()) if path.exists() else []
    results = [{"operation": "attention", "shape": list(SITE), "ours": ours, "theirs": theirs}]
    path.write_text(json.dumps([*runs, {"dtype": dtype, "results": results}]))
    winners.cache_clear()


def tile(site: tuple[int, ...] = SITE, dtype: torch.dtype = torch.float16, operation: str = "attention") -> str | None:
    return chosen(operation, site, torch.zeros(1, dtype=dtype), TILES)


def test_without_a_measurement_pytorch_runs(record: Path):
    assert tile() is None


def test_the_tile_that_beat_every_way_of_pytorchs_runs(record: Path):
    measured(record, {"wide": 9.0, "narrow": 7.0}, {"flash": 8.0, "cudnn": 10.0})
    assert tile() == "narrow"


def test_a_kernel_that_beat_only_some_ways_does_not_run(record: Path):
    measured(record, {"wide": 9.0}, {"flash": 8.0, "cudnn": 10.0})
    assert tile() is None


def test_inductors_fusion_competes_only_in_compiled_models(record: Path):
    measured(record, {"wide": 7.0}, {"eager": 9.0, INDUCTOR: 5.0})
    assert tile() == "wide"
    assert ("attention", SITE) in winners(GPU, "float16", compiled=False)
    assert ("attention", SITE) not in winners(GPU, "float16", compiled=True)


def test_the_newest_measurement_counts(record: Path):
    measured(record, {"wide": 5.0}, {"flash": 8.0})
    assert tile() == "wide"
    measured(record, {"wide": 9.0}, {"flash": 8.0})
    assert tile() is None


@pytest.mark.parametrize("other", [{"site": (4096, 4096, 8, 80)}, {"dtype": torch.bfloat16}, {"operation": "geglu"}])
def test_a_measurement_says_nothing_of_other_sites_and_dtypes(record: Path, other: dict[str, Any]):
    measured(record, {"wide": 5.0}, {"flash": 8.0})
    assert tile(**other) is None


def test_a_tile_that_is_no_longer_there_does_not_run(record: Path):
    measured(record, {"of an older kernel": 5.0}, {"flash": 8.0})
    assert tile() is None


def test_fp32_is_pytorchs(record: Path):
    measured(record, {"wide": 5.0}, {"flash": 8.0}, "float32")
    assert tile(dtype=torch.float32) is None
    with forced("kernels"):
        assert tile(dtype=torch.float32) is None


def test_what_the_benchmark_records_is_found(record: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    query = torch.zeros(1, 5, 2, 8)
    result = Result("attention", "a site", attention.site(query, query), 1, {"wide": 1.0}, {"flash": 2.0}, {}, 0.0)
    assert append(record.parent, [result], torch.device("cpu"), torch.float16) == record
    assert tile(attention.site(query, query)) == "wide"


def test_choices_can_be_forced(record: Path):
    measured(record, {"narrow": 5.0}, {"flash": 8.0})
    with forced("kernels"):
        assert tile() == "wide"
        with forced("pytorch"):
            assert tile() is None
        assert tile((1, 1, 1, 1)) == "wide"
    assert tile() == "narrow"


def test_a_cpu_prefers_pytorch(record: Path):
    measured(record, {"wide": 5.0}, {"flash": 8.0})
    assert not prefers_kernel("attention", SITE, torch.zeros(1, dtype=torch.float16))


def test_a_compiled_model_has_the_operation_where_it_was_chosen():
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def gate(x: Tensor) -> Tensor:
        return geglu.geglu(x)

    def operations() -> set[Any]:
        torch._dynamo.reset()
        graphs.clear()
        torch.compile(gate, backend=keep, fullgraph=True, dynamic=False)(torch.randn(2, 3, 16))
        return {node.target for node in graphs[0].graph.nodes if node.op == "call_function"}

    with forced("kernels"):
        assert torch.ops.reelray.geglu.default in operations()
    assert torch.ops.reelray.geglu.default not in operations()


def test_a_model_that_is_compiled_is_not_taken_for_one_that_is_exported(monkeypatch: pytest.MonkeyPatch):
    def gate(x: Tensor) -> Tensor:
        return x + 1 if choice.exporting() else x

    torch._dynamo.reset()
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # as in torch 2.11 while `torch.compile` traces
    assert torch.equal(compiled(torch.zeros(2)), torch.zeros(2))
    assert torch.equal(gate(torch.zeros(2)), torch.ones(2))


def test_a_measurement_is_asked_for_while_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def win(*site: Any) -> bool:
        asked.append(site)
        return True

    marked = torch.compiler.assume_constant_result(win)
    assert vars(choice._wins) == vars(marked), "it is marked as torch marks it"
    monkeypatch.setattr(choice, "_wins", marked)

    def gate(x: Tensor) -> Tensor:
        return x + 1 if choice._wins("geglu", geglu.site(x), x.dtype, 0) else x

    torch._dynamo.reset()
    compiled = torch.compile(gate, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(torch.zeros(2, 3, 16)), torch.ones(2, 3, 16))
    assert asked[0] == ("geglu", (3, 16), torch.float32, 0)


def test_records_in_the_repository_choose_tiles_that_the_kernels_still_have():
    """A record with a renamed tile would be ignored silently, and PyTorch would compute the site."""
    offered = {
        "attention": lambda shape: flash_attention.tiles(shape[3], 90),
        "temporal_attention": lambda shape: temporal.tiles(shape[3], 90),
        "group_norm_silu": lambda shape: group_norm_silu.CUTS,
        "geglu": lambda shape: geglu_triton.TILES,
        "residual_blend": lambda shape: residual_blend.TILES,
        "layer_norm": lambda shape: layer_norm.VALUES,
    }
    chosen_somewhere = set()
    for compiled in (False, True):
        for (operation, shape), tile in winners("NVIDIA H200", "float16", compiled=compiled).items():
            assert tile in map(str, offered[operation](shape)), (operation, shape, tile)
            chosen_somewhere.add(operation)
    assert chosen_somewhere == set(offered)
