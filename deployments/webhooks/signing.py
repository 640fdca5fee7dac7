"""What a webhook says and how it is signed: fal-queue-protocol.md, section 5.

Signed are the very bytes that are sent, together with the request, the user and the time. A receiver takes no signature that is
older than five minutes, so every attempt is signed anew; the body is rendered once and kept.

The private keys lie in the database as they are: whoever reads it can sign. They are shared that way by all couriers, and a
key to decrypt them would have to lie on the same machines.
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
"""The user's id where the service knows no users; an empty one would be lost on the way."""


@dataclass(frozen=True)
class SigningKey:
    """An ED25519 pair, 32 bytes each."""

    id: str
    private_key: bytes
    public_key: bytes

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new one. Its id is the begin of its public half's hash."""
        private = Ed25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        return cls(hashlib.sha256(public).hexdigest()[:16], private.private_bytes_raw(), public)


def webhook_body(job_id: UUID, result: dict[str, Any] | None, failure: dict[str, Any] | None, service_url: str) -> bytes:
    """The JSON to send for an ended job: what the result request would answer, as `payload`.

    failure: a `Failure` as stored; None for a job that succeeded. service_url: goes before the URLs of its files. Pure ASCII: a
    lone surrogate that a caller has sent, and an error echoes, has no UTF-8.
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
    """The public halves as a JSON Web Key Set (RFC 7517, 8037).

    `x` keeps its padding, against RFC 7515: the verifier in fal's documentation decodes it by Python's `urlsafe_b64decode`, which
    refuses 43 characters, and takes the key for none.
    """
    return {
        "keys": [
            {
                "kty": "OKP",
                "crv": "Ed25519",
                "x": base64.urlsafe_b64encode(key.public_key).decode(),
                "kid": key.id,
                "use": "sig",
                "alg": "EdDSA",
            }
            for key in keys
        ]
    }
