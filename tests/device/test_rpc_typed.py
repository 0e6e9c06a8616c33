"""Typed calls: pydantic checks both ways; services as objects and as classes; health and reflection."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, Field, field_validator

from aiordma.errors import MisuseError
from aiordma.rpc import (
    Health,
    InvalidReplyError,
    MethodInfo,
    Requests,
    RpcClient,
    RpcError,
    RpcServer,
    ServerContext,
    Service,
    StatusCode,
    bidi,
    client_stream,
    server_stream,
    unary,
)
from aiordma.rpc.builtin import ReflectionReply
from tests.device.calling import calling, eventually, reports

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]


class Get(BaseModel):
    key: str = Field(min_length=1, max_length=10)
    copies: int = Field(default=1, ge=1, le=9)


class Value(BaseModel):
    value: str


class Touchy(BaseModel):
    value: int

    @field_validator("value")
    @classmethod
    def check(cls, value: int) -> int:
        raise LookupError("a validator of the user's")


@dataclass
class Point:
    x: float
    y: float


class Shop(Service):
    """A service as a class, with a state of its own."""

    def __init__(self, name: str = "shop") -> None:
        super().__init__(name)
        self.served = 0

    @unary
    async def get(self, request: Get) -> Value:
        """One value.

        More about it.
        """
        self.served += 1
        return Value(value=request.key * request.copies)

    @server_stream
    async def items(self, request: Get, context: ServerContext) -> AsyncIterator[Value]:
        for i in range(request.copies):
            yield Value(value=f"{request.key}{i}")

    @client_stream(name="sum")
    async def add_up(self, requests: AsyncIterator[int]) -> int:
        return sum([request async for request in requests])

    @bidi
    async def mirror(self, requests: Requests[Point], context: ServerContext) -> AsyncIterator[Point]:
        async for point in requests:
            yield Point(point.y, point.x)

    @unary
    async def returns_a_dictionary(self, request: dict[str, int]) -> Value:
        return {"value": str(request["a"])}  # type: ignore[return-value]

    @unary
    async def returns_garbage(self, request: bytes) -> Value:
        return {"value": 5} if request else object()  # type: ignore[return-value]

    @unary
    async def broken_model(self, request: bytes) -> Value:
        return Value.model_construct(value=object())

    @unary
    async def nothing(self, request: None) -> None:
        pass

    @unary
    async def touchy(self, request: Touchy) -> bytes:
        return b""

    @unary(request=int, reply=list[int])
    async def spread(self, request, context):  # type: ignore[no-untyped-def]
        return list(range(request)) if request >= 0 else ["not a number"]


async def refused(call: Any) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await call
    return caught.value


async def test_typed_calls_of_all_kinds() -> None:
    shop = Shop()
    async with calling(shop) as client:
        assert await client.unary("shop/get", Get(key="a", copies=3), reply_type=Value) == Value(value="aaa")
        assert shop.served == 1
        items = client.server_stream("shop/items", Get(key="a", copies=3), reply_type=Value)
        assert [item.value async for item in items] == ["a0", "a1", "a2"]
        assert await client.client_stream("shop/sum", range(10), reply_type=int) == 45
        points = client.bidi("shop/mirror", [Point(1, 2), Point(3, 4)], reply_type=Point)
        assert [point async for point in points] == [Point(2, 1), Point(4, 3)]
        assert await client.unary("shop/returns_a_dictionary", {"a": 7}, reply_type=Value) == Value(value="7")
        assert await client.unary("shop/nothing", None) == b"null"
        assert await client.unary("shop/spread", 3, reply_type=list[int]) == [0, 1, 2]
        assert await client.unary("shop/get", b'{"key": "raw"}') == b'{"value":"raw"}'


async def test_an_invalid_request_names_the_field() -> None:
    shop = Shop()
    async with calling(shop) as client:
        error = await refused(client.unary("shop/get", {"key": "a", "copies": 10}))
        assert error.code is StatusCode.INVALID_ARGUMENT
        assert error.details == ("the request is not valid: copies: Input should be less than or equal to 9")
        error = await refused(client.unary("shop/get", {"key": "a secret that is too long", "copies": 0}))
        assert "key: String should have at most 10 characters; copies: " in error.details
        assert "secret" not in error.details
        error = await refused(client.unary("shop/get", b"{nonsense"))
        assert "message: Invalid JSON" in error.details
        error = await refused(client.unary("shop/get", b"\xff" * 20))
        assert error.code is StatusCode.INVALID_ARGUMENT
        error = await refused(client.client_stream("shop/sum", [1, 2, "three"]))
        assert error.code is StatusCode.INVALID_ARGUMENT
        assert "message: Input should be a valid integer" in error.details
        error = await refused(client.unary("shop/touchy", {"value": 1}))
        assert (error.code, error.details) == (
            StatusCode.INVALID_ARGUMENT,
            "the request is not valid: LookupError",
        )
        assert shop.served == 0


async def test_an_invalid_reply_of_the_handler() -> None:
    async with calling(Shop()) as client:
        with reports() as seen:
            error = await refused(client.unary("shop/returns_garbage", b"x"))
            assert error.code is StatusCode.INTERNAL
            assert error.details == "the reply is not valid: value: Input should be a valid string"
            error = await refused(client.unary("shop/returns_garbage"))
            assert error.code is StatusCode.INTERNAL
            error = await refused(client.unary("shop/broken_model"))
            assert error.code is StatusCode.INTERNAL
            error = await refused(client.unary("shop/spread", -1))
            assert error.code is StatusCode.INTERNAL
            assert [type(context["exception"]) for context in seen] == [InvalidReplyError] * 4


async def test_an_invalid_reply_at_the_client() -> None:
    async with calling(Shop()) as client:
        call = client.unary("shop/get", Get(key="a"), reply_type=Point)
        error = await refused(call)
        assert isinstance(error, InvalidReplyError)
        assert error.code is call.code() is StatusCode.INTERNAL
        assert error.details == "the reply is not valid: x: Field required; y: Field required"
        error = await refused(client.unary("shop/get", Get(key="a"), reply_type=Touchy))
        assert isinstance(error, InvalidReplyError)
        error = await refused(client.client_stream("shop/sum", [1], reply_type=Value))
        assert isinstance(error, InvalidReplyError)
        async with client.server_stream("shop/items", Get(key="a"), reply_type=int) as items:
            with pytest.raises(InvalidReplyError):
                await items.read()
        with pytest.raises(MisuseError, match="request is not valid"):
            client.unary("shop/get", Value.model_construct(value=object()))
        assert await client.unary("shop/get", Get(key="a"), reply_type=Value) == Value(value="a")
        await eventually(lambda: client.statistics().pending == 0)


async def test_views_instead_of_bytes() -> None:
    kinds: list[type] = []
    service = Service("")

    @service.unary
    async def view(payload: memoryview) -> memoryview:
        kinds.append(type(payload))
        return payload[1:]

    async with calling(service) as client:
        assert await client.unary("view", b"abc") == b"bc"
        reply = await client.unary("view", b"abc", reply_type=memoryview)
        assert isinstance(reply, memoryview)
        assert bytes(reply) == b"bc"
        assert kinds == [memoryview] * 2


async def test_handlers_of_other_forms() -> None:
    """Wrapped functions, partial ones, and annotations that are not there at run time."""

    def logged(function: Any) -> Any:
        @functools.wraps(function)
        async def wrapper(*arguments: Any) -> Any:
            return await function(*arguments)

        return wrapper

    service = Service("")

    @service.unary
    @logged
    async def wrapped(request: Get) -> Value:
        return Value(value=request.key)

    @service.unary
    async def unknown_context(request: Get, context: Nowhere) -> Value:  # type: ignore[name-defined]  # noqa: F821
        return Value(value=str(context.method))

    async def suffix(end: str, request: Get) -> Value:
        return Value(value=request.key + end)

    service.add(functools.partial(suffix, "!"), name="partial")
    async with calling(service) as client:
        values = [
            (await client.unary(name, Get(key="k"), reply_type=Value)).value
            for name in ("wrapped", "unknown_context", "partial")
        ]
        assert values == ["k", "unknown_context", "k!"]


# --- health and reflection ----------------------------------------------------------------------------


async def test_health() -> None:
    server = RpcServer([Shop(), Shop("other")])
    async with calling(server) as client:
        assert await client.health() is Health.SERVING
        server.set_health("other", Health.NOT_SERVING)
        assert await client.health("other") is Health.NOT_SERVING
        assert await client.health("shop", timeout=30) is Health.SERVING
        error = await refused(client.health("nothing"))
        assert error.code is StatusCode.NOT_FOUND
        with pytest.raises(MisuseError, match="no service"):
            server.set_health("nothing", Health.SERVING)
        await server.drain()
        assert await client.health("shop") is Health.NOT_SERVING


async def methods_of(client: RpcClient, prefix: str = "") -> dict[str, MethodInfo]:
    reply = await client.unary("reflection/methods", {"prefix": prefix}, reply_type=ReflectionReply)
    return {info.name: info for info in reply.methods}


async def test_reflection() -> None:
    shop = Shop()
    async with calling(shop) as client:
        methods = await methods_of(client)
        assert {"shop/get", "shop/sum", "health/check", "reflection/methods"} < set(methods)
        get = methods["shop/get"]
        assert (get.kind, get.description) == ("unary", "One value.")
        assert get.request is not None
        assert get.request["properties"]["key"] == {
            "maxLength": 10,
            "minLength": 1,
            "title": "Key",
            "type": "string",
        }
        assert methods["shop/touchy"].reply is None  # bytes
        assert methods["shop/sum"].kind == "client_stream"

        @shop.unary
        async def added_later(payload: bytes) -> bytes:
            return payload

        assert set(await methods_of(client, "shop/added")) == {"shop/added_later"}
        assert await client.unary("shop/added_later", b"x") == b"x"
    async with calling(shop, reflection=False) as client:
        error = await refused(client.unary("reflection/methods", {}))
        assert error.code is StatusCode.UNIMPLEMENTED


async def test_health_is_limited_too() -> None:
    """Calls of health are not counted as others, but one connection cannot have any number of them."""
    never = asyncio.Event()

    async def stuck(proceed: Any, request: Any, context: ServerContext) -> Any:
        await never.wait()
        return await proceed(request, context)

    async with calling(Shop(), interceptors=[stuck]) as client:
        calls = [client.unary("health/check", {}) for _ in range(100)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await eventually(lambda: sum(call.done() for call in calls) == 36)
        assert {call.code() for call in calls} == {None, StatusCode.RESOURCE_EXHAUSTED}
        never.set()
        await asyncio.wait(calls)
        assert [call.code() for call in calls].count(StatusCode.OK) == 64
