"""Documents of few bytes that would take much memory: refused before they are read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from relay.api.transfer_frame import read_document
from relay.refusal import ApiError

MOST = 4_000_000


async def read(body: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    return await read_document(Request({"type": "http", "method": "POST", "headers": []}, receive))


@pytest.mark.parametrize("value", [b"{}", b"[]", b"1", b'"a,b"'])
async def test_too_many_values_are_refused_before_they_are_read(value: bytes) -> None:
    count = MOST if value in (b"1", b'"a,b"') else MOST // 2
    with pytest.raises(ApiError) as problem:
        await read(b"[" + b",".join([value] * count) + b"]")
    assert (problem.value.status, problem.value.message) == (400, "The document has more than 4000000 values.")


async def test_what_names_contain_does_not_count() -> None:
    items = [{"path": ",{[" * 700 + '"\\' + str(number)} for number in range(2_500)]
    document = {"DATA": items}
    assert await read(msgspec.json.encode(document)) == document


@pytest.mark.parametrize(
    "body", [b'["' + b"," * (MOST + 1), b'["' + rb"\",\\," * MOST, b"[" + b'""' * MOST + b"," * MOST + b"1"]
)
async def test_what_is_no_json_is_refused_soon(body: bytes) -> None:
    with pytest.raises(ApiError, match=r"not JSON|4000000 values"):
        await read(body)
