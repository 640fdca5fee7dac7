from kernels.bench import all_sites
from kernels.bench_fusions import SITES

OPERATIONS = {"group_norm_silu", "geglu", "residual_blend", "layer_norm"}


def calls(operation: str, model: str) -> int:
    return sum(site.calls for site in SITES if site.operation == operation and site.name.startswith(model))


def test_the_sites_are_registered_for_every_operation_and_both_models():
    assert set(SITES) <= set(all_sites())
    found = {(site.operation, site.name.split()[0]) for site in SITES}
    of_unets = {(operation, model) for operation in OPERATIONS for model in ("animatediff", "controlnext")}
    assert found == of_unets | {("group_norm_silu", "vae")}


def test_the_calls_are_those_of_the_nets():
    """22 resnets, 16 spatial transformers and 21 motion modules; SVD's halves one after the other."""
    assert calls("group_norm_silu", "animatediff") == 22 * 2 + 1 + 16 + 21
    assert calls("geglu", "animatediff") == 16 + 21
    assert calls("layer_norm", "animatediff") == 3 * (16 + 21)
    assert calls("group_norm_silu", "controlnext") == 2 * (22 * 4 + 1 + 16)
    assert calls("geglu", "controlnext") == 2 * 16 * 3
    assert calls("layer_norm", "controlnext") == 2 * 16 * 5
