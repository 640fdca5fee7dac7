"""Needs a GPU: a recorded call computes what the function does, and can be called repeatedly."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engines.backends.graphed_call import GraphedCall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU: recording and replaying CUDA graphs, and sharing their memory, not verified",
    ),
]


def inputs(seed: int, size: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return {name: torch.randn(size, size, generator=generator, device="cuda") for name in ("x", "y")}


def times(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: (x @ y).relu() * weight


@torch.inference_mode()
def test_a_replay_computes_what_the_function_does_for_values_it_was_not_recorded_with():
    call = GraphedCall(times(2.0), inputs(0))
    for seed in (1, 2):
        given = inputs(seed)
        assert torch.equal(call(given), times(2.0)(**given))


@torch.inference_mode()
def test_the_output_outlives_the_next_replay_of_every_graph_of_the_pool():
    pool = torch.cuda.graph_pool_handle()
    calls = [GraphedCall(times(weight), inputs(0, size), pool) for weight, size in ((1.0, 64), (2.0, 96), (3.0, 64))]
    given = [inputs(i, size) for i, size in enumerate((64, 96, 64))]
    outputs = [call(each) for call, each in zip(calls, given, strict=True)]
    for output, weight, each in zip(outputs, (1.0, 2.0, 3.0), given, strict=True):
        assert torch.equal(output, times(weight)(**each))


@torch.inference_mode()
def test_inputs_may_have_other_strides_and_addresses_from_call_to_call():
    call = GraphedCall(times(1.0), inputs(0))
    given = inputs(1)
    turned = {name: tensor.T.contiguous().T for name, tensor in given.items()}
    assert torch.equal(call(turned), call(given))


@torch.inference_mode()
def test_weights_may_change_in_place():
    weight = torch.ones(64, 64, device="cuda")
    call = GraphedCall(lambda x, y: x + y + weight, inputs(0))
    weight.fill_(5.0)
    given = inputs(1)
    assert torch.equal(call(given), given["x"] + given["y"] + 5.0)


def test_another_thread_may_use_the_gpu_while_a_graph_is_recorded():
    def slow(x: Tensor, y: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            with ThreadPoolExecutor(1) as other:  # it allocates, which is forbidden if the whole process is recorded
                other.submit(lambda: torch.zeros(1 << 20, device="cuda").sum().item()).result()
        return x + y

    given = inputs(1)
    assert torch.equal(GraphedCall(slow, inputs(0))(given), given["x"] + given["y"])


def test_inputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="x is"):
        GraphedCall(times(1.0), inputs(0))(inputs(1, 32))
