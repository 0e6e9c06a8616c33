"""``aiordma call HOST:PORT METHOD``: calls a method of an RPC server, or lists what it offers.

The server is asked (reflection) how many requests and replies the method has; one that does not say is called with
one of each. Requests are the options ``--json`` and ``--data``, else standard input: all of it, or a line each
where the method takes a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

from ..errors import RdmaError
from .options import add_client_options, address, client_tls
from .output import print_json, table

if TYPE_CHECKING:
    from ..rpc import MethodInfo, RpcClient

HELP = "call a method of an RPC server, or list its methods"

_KINDS = ("unary", "server_stream", "client_stream", "bidi")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this subcommand."""
    parser.add_argument("address", metavar="HOST:PORT", type=address, help="the server's TCP bootstrap")
    parser.add_argument("method", metavar="METHOD", nargs="?", help="such as kv/get; without one, the list")
    parser.add_argument("--list", action="store_true", help="list the methods, or show METHOD with its types")
    parser.add_argument(
        "--json",
        metavar="TEXT",
        dest="requests",
        action="append",
        type=_json,
        help="a request, checked to be JSON; several for a stream",
    )
    parser.add_argument(
        "--data",
        metavar="TEXT",
        dest="requests",
        action="append",
        type=str.encode,
        help="a request as it is, in UTF-8",
    )
    parser.add_argument(
        "--metadata", metavar="KEY=VALUE", action="append", type=_pair, default=[], help="may be repeated"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=10.0, help="for all (default: 10)"
    )
    parser.add_argument("--kind", choices=_KINDS, help="of the method, for a server that does not tell")
    add_client_options(parser)


def _json(text: str) -> bytes:
    try:
        json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    return text.encode()


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def run(args: argparse.Namespace) -> int:
    """Status 0 when the call ended well; else :class:`~aiordma.errors.RdmaError` says how it did not."""
    asyncio.run(_run(args))
    return 0


async def _run(args: argparse.Namespace) -> None:
    from ..connect import connect
    from ..rpc import RpcClient

    host, port = args.address
    try:
        async with asyncio.timeout(args.timeout):
            connecting = connect(
                host, port, device=args.device, ssl=client_tls(args), token=args.token, timeout=None
            )
            async with connecting as connection, RpcClient(connection) as client:
                if args.list or args.method is None:
                    await _list(client, args.method)
                else:
                    await _call(client, args)
    except TimeoutError as error:
        if isinstance(error, RdmaError):
            raise
        raise RdmaError(f"{host}:{port} did not answer within {args.timeout} s") from None
    except OSError as error:
        if isinstance(error, RdmaError):
            raise
        raise RdmaError(f"cannot connect to {host}:{port}: {error}") from error


# --- what there is ------------------------------------------------------------------------------------


async def _methods(client: RpcClient, prefix: str) -> list[MethodInfo]:
    from ..rpc.builtin import REFLECTION, ReflectionReply, ReflectionRequest

    request = ReflectionRequest(prefix=prefix)
    return (await client.unary(REFLECTION, request, reply_type=ReflectionReply)).methods


async def _list(client: RpcClient, name: str | None) -> None:
    methods = await _methods(client, name or "")
    if name is None:
        rows = [
            (info.name, info.kind, _title(info.request), _title(info.reply), info.description.split("\n")[0])
            for info in methods
        ]
        print(table(("method", "kind", "request", "reply", "description"), rows))
        return
    found = [info for info in methods if info.name == name]
    if not found:
        raise RdmaError(f"the server has no method {name!r}; without a name, all are listed")
    print_json(found[0].model_dump())


def _title(schema: dict[str, Any] | None) -> str:
    """The short name of a type."""
    if schema is None:
        return "bytes"
    return str(schema.get("title") or schema.get("type") or "JSON")


# --- the call -----------------------------------------------------------------------------------------


async def _call(client: RpcClient, args: argparse.Namespace) -> None:
    method: str = args.method
    info = await _find(client, method)
    kind = args.kind or (info.kind if info is not None else "unary")
    streams = kind in ("client_stream", "bidi")
    requests = _requests(args.requests, streams)
    options: dict[str, Any] = {"metadata": dict(args.metadata), "timeout": args.timeout}
    if not streams and len(requests) > 1:
        raise RdmaError(f"{method} takes one request, {len(requests)} were given")
    single = requests[0] if requests else b"{}" if info is not None and info.request is not None else b""
    if kind == "unary":
        _print(await client.unary(method, single, **options))
    elif kind == "client_stream":
        _print(await client.client_stream(method, requests, **options))
    elif kind == "server_stream":
        async for reply in client.server_stream(method, single, **options):
            _print(reply)
    else:
        async for reply in client.bidi(method, requests, **options):
            _print(reply)


async def _find(client: RpcClient, method: str) -> MethodInfo | None:
    """What the server says of the method, if it says anything."""
    from ..rpc import RpcError, StatusCode

    try:
        return next((info for info in await _methods(client, method) if info.name == method), None)
    except RpcError as error:
        if error.code is StatusCode.UNIMPLEMENTED:
            return None
        raise


def _requests(given: list[bytes] | None, streams: bool) -> list[bytes]:
    if given is not None or sys.stdin.isatty():
        return given or []
    data = sys.stdin.buffer.read()
    if streams:
        return data.splitlines()
    return [data] if data else []


def _print(reply: bytes) -> None:
    sys.stdout.buffer.write(reply if reply.endswith(b"\n") else reply + b"\n")
    sys.stdout.buffer.flush()
