"""Timesteps, samplers and guidance as pure functions of tensors; each gives its equation."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]

LCM_GRID = 50
"""Steps of the teacher's grid, on which an LCM was distilled; a request may have 1 to this many."""

_RHO = 7.0
_SIGMA_DATA = 0.5
_TIMESTEP_SCALING = 10.0


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod: (T,) fp32, abar_t = prod(1 - beta). prediction_type: what the UNet returns."""

    alphas_cumprod: Tensor
    prediction_type: PredictionType = "epsilon"


def linear_schedule(
    beta_start: float = 0.00085, beta_end: float = 0.012, train_steps: int = 1000, prediction_type: PredictionType = "epsilon"
) -> NoiseSchedule:
    """Betas linear in t: AnimateLCM's setting. SD's own is linear in sqrt(beta) and gives bad results with AnimateLCM."""
    betas = torch.linspace(beta_start, beta_end, train_steps, dtype=torch.float32)
    return NoiseSchedule(torch.cumprod(1.0 - betas, dim=0), prediction_type)


def lcm_timesteps(steps: int, train_steps: int = 1000) -> tuple[int, ...]:
    """The grid g_j = (train_steps / 50) j - 1, j = 1..50, read downwards at floor(50 i / steps): 4 steps are 999, 759, 499, 259.

    LCM, arXiv 2310.04378, section 4.3. Raises `ValueError` unless 1 <= steps <= 50.
    """
    if not 1 <= steps <= LCM_GRID:
        raise ValueError(f"LCM takes 1 to {LCM_GRID} steps, not {steps}")
    stride = train_steps // LCM_GRID
    return tuple(stride * (LCM_GRID - LCM_GRID * i // steps) - 1 for i in range(steps))


def predict_clean(x: Tensor, output: Tensor, abar: Tensor, prediction_type: PredictionType) -> Tensor:
    """x0 from the UNet's output; abar scalar.

    epsilon: (x - sqrt(1 - abar) eps) / sqrt(abar). v_prediction: sqrt(abar) x - sqrt(1 - abar) v, arXiv 2202.00512.
    """
    if prediction_type == "epsilon":
        return (x - (1 - abar).sqrt() * output) / abar.sqrt()
    if prediction_type == "v_prediction":
        return abar.sqrt() * x - (1 - abar).sqrt() * output
    return output


def lcm_step(schedule: NoiseSchedule, x: Tensor, output: Tensor, t: int, t_next: int | None, noise: Tensor | None) -> Tensor:
    """One LCM step from t to t_next, or to the clean sample when t_next is None.  arXiv 2310.04378, eq. 9 and algorithm 3.

    d = c_out(t) x0 + c_skip(t) x, c_skip = 0.25 / (s^2 + 0.25), c_out = s / sqrt(s^2 + 0.25), s = 10 t;
    then x' = sqrt(abar') d + sqrt(1 - abar') noise. x, output, noise: one shape; x fp32.
    """
    abar = schedule.alphas_cumprod
    scaled = t * _TIMESTEP_SCALING
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + _SIGMA_DATA**2) ** 0.5
    denoised = c_out * predict_clean(x, output, abar[t], schedule.prediction_type) + c_skip * x
    if t_next is None:
        return denoised
    assert noise is not None
    return abar[t_next].sqrt() * denoised + (1 - abar[t_next]).sqrt() * noise


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    """s_i = (smax^(1/7) + i / (n - 1) (smin^(1/7) - smax^(1/7)))^7 for i = 0..n-1, then 0; n = 1 is (smax, 0).

    Karras et al., arXiv 2206.00364, eq. 5. Raises `ValueError` for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least one step, not {steps}")
    high, low = sigma_max ** (1 / _RHO), sigma_min ** (1 / _RHO)
    return (*((high + i / max(steps - 1, 1) * (low - high)) ** _RHO for i in range(steps)), 0.0)


def euler_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One Euler step of a v-prediction: x0 = x / (s^2 + 1) - s v / sqrt(s^2 + 1); x' = x + (x - x0) / s (s' - s).

    Computed as x0 + (x - x0) s' / s, because for small s' the other form subtracts two large numbers.
    x, velocity: one shape; x fp32. arXiv 2206.00364, algorithm 1 without churn; v: arXiv 2202.00512, appendix D.
    """
    clean = x / (sigma**2 + 1) - velocity * (sigma / (sigma**2 + 1) ** 0.5)
    return clean + (x - clean) * (sigma_next / sigma)


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: u + g (c - u).  arXiv 2207.12598, eq. 6 with w = g - 1."""
    return unconditional + scale * (conditional - unconditional)


def seeded_generator(seed: int) -> torch.Generator:
    """The request's only generator. It is on the CPU for every device, so that a seed gives the same noise everywhere."""
    return torch.Generator("cpu").manual_seed(seed)


def restored_generator(state: Tensor) -> torch.Generator:
    """The generator in a state that `get_state` returned: (5056,) uint8."""
    generator = torch.Generator("cpu")
    generator.set_state(state.clone())  # a tensor from Ray's object store is read-only
    return generator
