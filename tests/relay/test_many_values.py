"""Documents of few bytes that would take much memory: refused before they are read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from relay.api import documents
from relay.api.holding import Holding, Memory
from relay.api.transfer_frame import read_document
from relay.refusal import ApiError

MOST = 400_000


@pytest.fixture
def _fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_MAX_VALUES", MOST)


async def read(body: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": [], "client": ("192.0.2.1", 1)}
    Holding(scope, Memory.of(64 << 20))
    return await read_document(Request(scope, receive))


async def refusal(body: bytes) -> tuple[int, str]:
    with pytest.raises(ApiError) as problem:
        await read(body)
    return problem.value.status, problem.value.message


async def test_a_document_has_so_many_values_at_most() -> None:
    assert await refusal(b"[" + b"1," * 2_499_999 + b"1]") == (400, "The document has more than 2500000 values.")


@pytest.mark.usefixtures("_fewer")
@pytest.mark.parametrize("value", [b"{}", b"[]", b"1", b'"a,b"'])
async def test_too_many_values_are_refused_before_they_are_read(value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    count = MOST if value in (b"1", b'"a,b"') else MOST // 2
    monkeypatch.delattr(msgspec.json, "decode")
    assert await refusal(b"[" + b",".join([value] * count) + b"]") == (400, "The document has more than 400000 values.")


@pytest.mark.usefixtures("_fewer")
async def test_what_names_contain_does_not_count() -> None:
    items = [{"path": ",{[" * 700 + '"\\' + str(number)} for number in range(250)]
    document = {"DATA": items}
    assert await read(msgspec.json.encode(document)) == document


@pytest.mark.usefixtures("_fewer")
@pytest.mark.parametrize(
    "body", [b'["' + b"," * (MOST + 1), b'["' + rb"\",\\," * MOST, b"[" + b'""' * MOST + b"," * MOST + b"1"]
)
async def test_what_is_no_json_is_refused_soon(body: bytes) -> None:
    status, message = await refusal(body)
    assert status == 400
    assert "not JSON" in message or "more than 400000 values" in message
