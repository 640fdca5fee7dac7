from collections.abc import AsyncIterator

import asyncpg
import pytest


@pytest.fixture
async def sql(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection past the store, to look behind it and to move rows in time."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()
