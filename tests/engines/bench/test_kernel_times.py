import pytest

from engines.bench.kernel_times import KernelTime, by_kind, kind_of


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "product"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("kernel", "attention"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", "norm"),
        ("chunk_moments", "norm"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float>", "copy"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>", "elementwise"),
        ("geglu_rows", "elementwise"),
        ("something_new", "other"),
    ],
)
def test_the_kind_of_a_kernel_is_read_from_its_name(kernel: str, kind: str):
    assert kind_of(kernel) == kind


def test_kinds_are_summed_and_the_longest_comes_first():
    kernels = [KernelTime("geglu_rows", 1.0, 3), KernelTime("nvjet_a", 2.0, 1), KernelTime("blend_rows", 1.5, 2)]
    assert by_kind(kernels) == (KernelTime("elementwise", 2.5, 5), KernelTime("product", 2.0, 1))
