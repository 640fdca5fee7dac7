"""The body of a webhook and its signature: fal-queue-protocol.md, section 5.

The signature covers the exact bytes that are sent, the request's id, the user's id and the time. Receivers refuse signatures
older than five minutes, so every attempt is signed again; the body is rendered once and stored.

The private keys are stored unencrypted in the database, where all couriers find them: whoever can read it can sign. Encryption
would not help, because the key for it would have to be on the same machines.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deployments.schemas.responses import with_absolute_urls

ANYBODY = "anonymous"
"""The user's id in an open service, which has no users; an empty header could be dropped on the way."""


@dataclass(frozen=True)
class SigningKey:
    """An ED25519 pair, 32 bytes each."""

    id: str
    private_key: bytes
    public_key: bytes

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new pair. Its id is the first 16 hex digits of the public key's SHA-256."""
        private = Ed25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        return cls(hashlib.sha256(public).hexdigest()[:16], private.private_bytes_raw(), public)


def webhook_body(job_id: UUID, result: dict[str, Any] | None, failure: dict[str, Any] | None, service_url: str) -> bytes:
    """The JSON to send for an ended job: what the result request would answer, as `payload`.

    failure: a `Failure` as stored; None for a job that succeeded. service_url: put before the URLs of its files. Pure ASCII: an
    error may quote a lone surrogate from the caller's input, which UTF-8 cannot encode.
    """
    body: dict[str, Any] = {"request_id": str(job_id), "gateway_request_id": str(job_id)}
    if failure is None:
        body |= {"status": "OK", "payload": with_absolute_urls(result, service_url)}
    else:
        body |= {"status": "ERROR", "error": f"Invalid status code: {failure['status']}", "payload": failure["body"]}
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")


def signed_headers(key: SigningKey, job_id: UUID, owner: str | None, body: bytes, timestamp: int) -> dict[str, str]:
    """The headers of one attempt. timestamp: in seconds since 1970."""
    parts = (str(job_id), owner or ANYBODY, str(timestamp))
    message = "\n".join((*parts, hashlib.sha256(body).hexdigest())).encode()
    signature = Ed25519PrivateKey.from_private_bytes(key.private_key).sign(message)
    return {
        "content-type": "application/json",
        "x-fal-webhook-request-id": parts[0],
        "x-fal-webhook-user-id": parts[1],
        "x-fal-webhook-timestamp": parts[2],
        "x-fal-webhook-signature": signature.hex(),
    }


def jwks(keys: list[SigningKey]) -> dict[str, Any]:
    """The public keys as a JSON Web Key Set (RFC 7517, 8037).

    Each key is there twice, because no one `x` suits all receivers. Strict readers (browsers' `importKey`, go-jose) follow RFC
    7515 and refuse padding. The verifier in fal's documentation decodes `x` with Python's `urlsafe_b64decode`, which raises
    without the padding, and then it skips the key. Receivers try every key, so each of them finds one that it can read.
    """
    return {"keys": [_jwk(key, padded) for key in keys for padded in (False, True)]}


def _jwk(key: SigningKey, padded: bool) -> dict[str, str]:
    x = base64.urlsafe_b64encode(key.public_key).decode()
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "x": x if padded else x.rstrip("="),
        "kid": f"{key.id}-padded" if padded else key.id,
        "use": "sig",
        "alg": "EdDSA",
    }
