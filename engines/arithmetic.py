"""How exact a GPU's arithmetic is: torch would let it round where nobody asked for it."""

import torch


def exact_arithmetic() -> None:
    """For the whole process: fp32 is fp32, and products of halves are summed in fp32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # inputs of convolutions to 10 bits
    # where a product's sum is split, its parts
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
