import base64
import json
from uuid import UUID

import pytest

from deployments.webhooks.signing import SigningKey, jwks, signed_headers, webhook_body
from tests.deployments.webhooks.receiver import Received, is_signed

JOB = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
FILE = {"url": "/files/v/video.mp4", "content_type": "video/mp4", "file_name": "video.mp4", "file_size": 3}


def test_a_result_is_told_with_absolute_urls():
    body = json.loads(webhook_body(JOB, {"video": FILE, "seed": 1}, None, "https://here.example"))
    assert body == {
        "request_id": str(JOB),
        "gateway_request_id": str(JOB),
        "status": "OK",
        "payload": {"video": {**FILE, "url": "https://here.example/files/v/video.mp4"}, "seed": 1},
    }


def test_a_failure_is_told_as_the_result_request_answers_it():
    failure = {"status": 422, "body": {"detail": [{"loc": ["body", "prompt"], "msg": "\ud800\0"}]}, "error": "", "headers": {}}
    raw = webhook_body(JOB, None, failure, "")
    assert raw.isascii()
    assert json.loads(raw) == {
        "request_id": str(JOB),
        "gateway_request_id": str(JOB),
        "status": "ERROR",
        "error": "Invalid status code: 422",
        "payload": failure["body"],
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"body": b"{} "},
        {"headers": {"x-fal-webhook-user-id": "somebody"}},
        {"headers": {"x-fal-webhook-timestamp": "1001"}},
        {"headers": {"x-fal-webhook-request-id": str(UUID(int=1))}},
    ],
)
def test_whatever_is_changed_the_signature_no_longer_holds(changed: dict):
    key, other = SigningKey.generate(), SigningKey.generate()
    headers = signed_headers(key, JOB, "me", b"{}", 1000)
    assert len(headers["x-fal-webhook-signature"]) == 128
    assert is_signed(Received("/", headers, b"{}"), jwks([other, key]), 1000)
    assert not is_signed(Received("/", headers, b"{}"), jwks([other]), 1000)
    received = Received("/", headers | changed.get("headers", {}), changed.get("body", b"{}"))
    assert not is_signed(received, jwks([key]), 1000)


def test_where_there_are_no_users_the_user_has_a_name_all_the_same():
    headers = signed_headers(SigningKey.generate(), JOB, None, b"{}", 1000)
    assert headers["x-fal-webhook-user-id"] == "anonymous"


def test_a_key_is_published_for_strict_readers_and_for_fals_verifier():
    key = SigningKey.generate()
    strict, padded = jwks([key])["keys"]
    assert strict["kid"] == key.id != padded["kid"]
    assert "=" not in strict["x"]
    assert base64.urlsafe_b64decode(strict["x"] + "=") == base64.urlsafe_b64decode(padded["x"]) == key.public_key
    assert (strict["kty"], strict["crv"]) == ("OKP", "Ed25519")
