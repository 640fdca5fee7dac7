"""A bucket of a server that speaks S3: moto in server mode, on a loopback port, in a thread of this process."""

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import httpx
import pytest
from s3fs import S3FileSystem

BUCKET = "reelray"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Its URL."""
    from moto.server import ThreadedMotoServer  # slow to import, and every worker imports this file

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@contextmanager
def bucket(url: str, patched: pytest.MonkeyPatch) -> Iterator[str]:
    """The fsspec URL of an empty bucket. The environment leads to it, as it does for an operator of an S3-compatible store."""
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": url}).items():
        patched.setenv(name, value)
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=BUCKET)
    S3FileSystem.clear_instance_cache()
    client.close()
    yield f"s3://{BUCKET}/files"
    httpx.post(f"{url}/moto-api/reset")
