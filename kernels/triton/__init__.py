"""The Triton side of the operations. Import it late: only CUDA's path and the tests of the kernels need triton."""
