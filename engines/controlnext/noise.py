"""The levels of noise that SVD's steps go through. Reads one small file and loads no network."""

from dataclasses import dataclass
from typing import Any

from engines.checkpoints.weights import locate, read_json, require
from engines.controlnext.config import ControlNeXtWeights
from engines.sampling import karras_sigmas

SCHEDULER = "scheduler/scheduler_config.json"

_SCHEDULER_DEFAULTS: dict[str, Any] = {"prediction_type": "epsilon", "timestep_type": "discrete", "use_karras_sigmas": False}
"""Defaults of diffusers' `EulerDiscreteScheduler`, for a config that leaves them out."""

_SCHEDULER_NEEDS: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}


@dataclass(frozen=True)
class NoiseRange:
    """The smallest and the largest sigma."""

    sigma_min: float
    sigma_max: float

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The sigma before each step, and 0 after the last: steps + 1 values."""
        return karras_sigmas(steps, self.sigma_min, self.sigma_max)


def load_noise_range(weights: ControlNeXtWeights) -> NoiseRange:
    """The smallest and the largest sigma, 0.002 and 700 as published."""
    path = locate(weights.base, [SCHEDULER]) / SCHEDULER
    config = read_json(path)
    require(_SCHEDULER_DEFAULTS | config, _SCHEDULER_NEEDS, str(path))
    return NoiseRange(config.get("sigma_min", 0.002), config.get("sigma_max", 700.0))
