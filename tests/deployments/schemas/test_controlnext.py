"""Permitted values of fal-ai/controlnext's parameters: `video-models.md` 3B, column "server". Checked without any download."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.schemas.controlnext import ControlNeXtInput
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.failures import validation_failure
from engines.controlnext.spec import ControlNeXtSpec

URLS = {"image_url": "https://a.example/x.png", "video_url": "https://a.example/x.mp4"}


def parsed(**change: Any) -> ControlNeXtInput:
    return ControlNeXtInput.parse(json.dumps(URLS | change).encode()).input


def faults(**change: Any) -> list[tuple[str, str]]:
    """(field, type) of every error, from fal's error format."""
    with pytest.raises(ValidationError) as refused:
        parsed(**change)
    failure = validation_failure(refused.value)
    assert failure.status == 422
    return [(".".join(map(str, detail["loc"])), detail["type"]) for detail in failure.body["detail"]]


def test_the_defaults_are_the_api_pages():
    asked = parsed().model_dump(exclude={"image_url", "video_url", "seed", "video_is_pose", "strict_reference"})
    assert asked == {
        "height": 1024,
        "width": 576,
        "guidance_scale": 3,
        "num_inference_steps": 25,
        "max_frame_num": 240,
        "batch_frames": 24,
        "overlap": 6,
        "sample_stride": 2,
        "decode_chunk_size": 2,
        "motion_bucket_id": 127,
        "fps": 7,
        "controlnext_cond_scale": 1,
    }
    assert not parsed().video_is_pose
    assert not parsed().strict_reference


@pytest.mark.parametrize(
    ("field", "lowest", "highest"),
    [
        ("guidance_scale", 1, 10),
        ("num_inference_steps", 1, 50),
        ("max_frame_num", 2, 240),
        ("sample_stride", 1, 8),
        ("decode_chunk_size", 1, 32),
        ("motion_bucket_id", 0, 255),
        ("fps", 1, 60),
        ("controlnext_cond_scale", 0, 2),
        ("batch_frames", 7, 32),  # above the default overlap
        ("overlap", 1, 23),
    ],
)
def test_ranges(field: str, lowest: int, highest: int):
    for value in (lowest, highest):
        assert getattr(parsed(**{field: value}), field) == value
    for value in (lowest - 1, highest + 1, "many", None, True, [1], float("nan"), float("inf")):
        ((found, _), *_) = faults(**{field: value})
        # for a window that is too short, the error names the overlap
        assert found in (f"body.{field}", "body.overlap")


def test_an_overlap_must_be_less_than_the_window():
    assert faults(overlap=0) == [("body.overlap", "greater_than_equal")]
    assert faults(overlap=24) == [("body.overlap", "less_than")]
    assert faults(overlap=6, batch_frames=6) == [("body.overlap", "less_than")]
    assert parsed(overlap=1, batch_frames=2).overlap == 1
    assert faults(batch_frames=1, overlap=1) == [("body.batch_frames", "greater_than_equal")]
    with pytest.raises(ValidationError) as refused:
        parsed(overlap=30)
    (detail,) = validation_failure(refused.value).body["detail"]
    assert detail["ctx"] == {"lt": 24}
    assert detail["input"] == 30
    assert detail["msg"] == "Input should be less than batch_frames, 24"


@pytest.mark.parametrize("field", ["height", "width"])
def test_sides_are_multiples_of_64_between_256_and_1024(field: str):
    for value in (256, 320, 576):
        assert getattr(parsed(**{field: value}), field) == value
    for value in (1000, 584, 544, 288):
        assert faults(**{field: value}) == [(f"body.{field}", "multiple_of")]
    assert faults(**{field: 192}) == [(f"body.{field}", "greater_than_equal")]
    assert faults(**{field: 1088}) == [(f"body.{field}", "less_than_equal")]


def test_a_frame_has_no_more_pixels_than_the_model_was_trained_on():
    assert parsed(height=768, width=768).height == 768
    assert parsed(height=576, width=1024).width == 1024
    assert faults(height=1024, width=640) == [("body.height", "value_error")]


@pytest.mark.parametrize("field", ["image_url", "video_url"])
def test_both_files_are_needed_and_come_by_url_or_as_data_uri(field: str):
    assert faults(**{field: "/etc/passwd"}) == [(f"body.{field}", "url_scheme")]
    assert faults(**{field: None}) == [(f"body.{field}", "string_type")]
    with pytest.raises(ValidationError) as missing:
        ControlNeXtInput.parse(json.dumps({key: url for key, url in URLS.items() if key != field}).encode())
    assert [error["type"] for error in missing.value.errors()] == ["missing"]
    assert parsed(**{field: "data:video/mp4;base64,AAAA"}).media()[field].startswith("data:")


@pytest.mark.parametrize("field", ["video_is_pose", "strict_reference"])
def test_a_switch_is_true_or_false_and_nothing_else(field: str):
    assert getattr(parsed(**{field: True}), field) is True
    for value in ("true", 1, None):
        assert faults(**{field: value}) == [(f"body.{field}", "bool_type")]


def test_every_parameter_reaches_the_model():
    values: dict[str, Any] = {
        "height": 512,
        "width": 320,
        "guidance_scale": 2.5,
        "num_inference_steps": 12,
        "max_frame_num": 99,
        "batch_frames": 16,
        "overlap": 4,
        "sample_stride": 3,
        "decode_chunk_size": 8,
        "motion_bucket_id": 30.5,
        "fps": 24,
        "controlnext_cond_scale": 0.5,
        "seed": 2**63 - 1,
        "video_is_pose": True,
        "strict_reference": True,
    }
    spec = parsed(**values).spec({"image_url": Path("a"), "video_url": Path("b")})
    assert spec == ControlNeXtSpec(image=Path("a"), video=Path("b"), **values)
    assert all(values[name] != parsed().model_dump()[name] for name in values), "each differs from its default"


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=str)
def test_a_seed_is_drawn_once_and_fits_a_double(endpoint: Any):
    given = {"prompt": "a"} if endpoint.family == "animatediff" else URLS
    resolved = endpoint.input.parse(json.dumps(given | {"seed": -1}).encode()).input.resolved()
    assert 0 <= resolved.seed < 2**32
    assert resolved.resolved() == resolved
