import pytest
import torch

from engines.backends.fixed_inputs import FixedInputs


def test_values_arrive_whatever_their_strides_and_the_tensors_stay_where_they_are():
    fixed = FixedInputs({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    where = [tensor.data_ptr() for tensor in fixed.tensors.values()]
    a, b = torch.randn(3, 2).T, torch.randn(1).expand(4)
    fixed.fill({"b": b, "a": a})
    assert torch.equal(fixed.tensors["a"], a)
    assert torch.equal(fixed.tensors["b"], b)
    assert [tensor.data_ptr() for tensor in fixed.tensors.values()] == where


def test_a_shape_that_a_copy_would_spread_is_refused():
    fixed = FixedInputs({"a": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"a is \(1, 3\), not \(2, 3\)"):
        fixed.fill({"a": torch.ones(1, 3)})
    assert not fixed.tensors["a"].any()


@pytest.mark.parametrize("inputs", [{}, {"a": torch.zeros(2), "b": torch.zeros(2)}])
def test_a_missing_or_a_strange_input_is_refused(inputs: dict[str, torch.Tensor]):
    with pytest.raises(ValueError, match=r"are not the call's: (a|b)$"):
        FixedInputs({"a": torch.zeros(2)}).fill(inputs)
