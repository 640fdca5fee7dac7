"""What generic tools send besides the input: fields that an endpoint does not have, empty ones, texts without end."""

import hashlib
import json
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.schemas.animatediff import AnimateDiffInput
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.failures import MAX_FAULTS, validation_failure
from deployments.schemas.inputs import INPUT_VERSION, MAX_TEXT_CHARS, Parsed

URL = "https://a.example/x.png"


def parsed(*, refuse_unknown: bool = False, **given: Any) -> Parsed[AnimateDiffInput]:
    return AnimateDiffInput.parse(json.dumps({"prompt": "a"} | given).encode(), refuse_unknown=refuse_unknown)


def test_unknown_fields_are_ignored_and_named():
    found = parsed(duration="5", aspect_ratio=None, enable_safety_checker=True)
    assert found.ignored == ("duration", "aspect_ratio", "enable_safety_checker")
    assert found.notes == ("ignored, because this endpoint has no such fields: duration, aspect_ratio, enable_safety_checker",)
    assert found.input == parsed().input
    assert parsed().notes == ()


def test_of_many_unknown_fields_a_few_are_named_and_their_names_are_cut():
    found = parsed(**{f"{i}" * 1000: i for i in range(50)})
    assert len(found.ignored) == MAX_FAULTS
    assert max(map(len, found.ignored)) == 60
    assert found.notes[0].endswith(" and 30 more")


def test_unknown_fields_are_faults_where_the_operator_says_so():
    with pytest.raises(ValidationError) as refused:
        parsed(refuse_unknown=True, seed=-2, **{f"{i}" * 1000: i for i in range(500)})
    details = validation_failure(refused.value).body["detail"]
    assert len(details) == MAX_FAULTS
    assert {detail["type"] for detail in details} == {"greater_than_equal", "extra_forbidden"}
    assert len(json.dumps(details)) < 10_000


@pytest.mark.parametrize("unused", ["", " ", None])
def test_an_empty_field_is_not_given(unused: str | None):
    found = parsed(seed=unused, keyframe_0_image_url=unused, keyframe_0_index=unused, keyframe_1_image_url=unused)
    assert found.input.media() == {}
    assert found.input.seed is None


def test_a_keyframe_that_is_sent_empty_is_not_used_whatever_its_index():
    found = parsed(
        keyframe_0_image_url=URL, keyframe_0_index=0, keyframe_1_image_url="", keyframe_1_index=0, keyframe_2_image_url=""
    )
    assert list(found.input.media()) == ["keyframe_0_image_url"]
    with pytest.raises(ValidationError):
        parsed(keyframe_1_index=0)  # more likely a URL under a misspelt name


def test_a_long_prompt_is_cut_and_the_log_says_so():
    found = parsed(prompt="word " * 1000)
    assert found.input.prompt == ("word " * 1000)[:MAX_TEXT_CHARS]
    assert found.notes == ("prompt has 5000 characters, of which only the first 2000 are used",)


def test_blanks_do_not_push_a_prompt_out():
    found = parsed(prompt=" " * 5000 + "a city")
    assert (found.input.prompt, found.notes) == ("a city", ())


def test_a_stored_input_of_another_version_is_still_an_input():
    job = {"prompt": "a", "a_later_field": 1}
    assert AnimateDiffInput.stored(job).prompt == "a"
    said = f"accepted under version 7 of the inputs; this service has {INPUT_VERSION} and ignores a_later_field"
    assert AnimateDiffInput.unread(job, 7) == said
    assert AnimateDiffInput.unread({"prompt": "a"}, 7) is None


def test_other_fields_are_another_version():
    fields = {endpoint.id: sorted(endpoint.input.model_fields) for endpoint in ENDPOINTS.values()}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    assert (INPUT_VERSION, digest[:16]) == (1, "45b5b0da48a6f667"), "increase INPUT_VERSION, then write down the new digest"


def test_only_a_stored_input_refers_to_kept_files():
    job = {"prompt": "a", "keyframe_0_image_url": f"kept:inputs/{'0' * 32}/data", "keyframe_0_index": 0}
    assert AnimateDiffInput.stored(job).media() == {"keyframe_0_image_url": job["keyframe_0_image_url"]}
    with pytest.raises(ValidationError, match="URL scheme"):
        parsed(**job)
