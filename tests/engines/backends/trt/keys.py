from engines.backends.trt.cache import Gpu, PlanKey

KEY = PlanKey(
    library="tensorrt",
    version="11.4.0.106",
    gpu=Gpu("NVIDIA H200", (9, 0), 132, 580),
    graph="a" * 64,
    weights="b" * 64,
    precision="float16",
    profiles=("16x64x64",),
    plugins="c" * 64,
    triton="3.7.1",
    flags=("REFIT",),
)

PLAN = bytes(range(256)) * 100
