"""How exact a GPU's arithmetic is: by default torch lets some operations round more than their dtype does."""

import torch


def exact_arithmetic() -> None:
    """For the whole process: fp32 is fp32, and products of halves are summed in fp32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # else inputs are rounded to 10 bits
    # else, where a library splits the sum of a product, it may round the partial sums to half precision
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
