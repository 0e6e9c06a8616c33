"""Options that several subcommands have: addresses, sizes, the device, who may come in."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from ..errors import RdmaError

if TYPE_CHECKING:
    import ssl

_SIZE = re.compile(r"(\d+) ?(?:([KMG])(?:iB)?|B|bytes)?", re.IGNORECASE)


def address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, IPv6 addresses in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def address_text(host: str, port: int) -> str:
    """The counterpart of :func:`address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def nbytes(text: str) -> int:
    """``64``, ``4KiB``, ``1M``: a number of bytes, at least 1."""
    match = _SIZE.fullmatch(text.strip())
    value = int(match[1]) << 10 * " KMG".index((match[2] or " ").upper()) if match else 0
    if not 1 <= value <= 1 << 30:
        raise argparse.ArgumentTypeError(f"{text!r} is no size from 1 byte to 1 GiB, such as 64, 4KiB, 1MiB")
    return value


def sizes(text: str) -> list[int]:
    """Sizes, separated by commas."""
    return [nbytes(word) for word in text.split(",")]


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0 and of at most a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, and at most 86400")
    return value


# --- who may come in ----------------------------------------------------------------------------------


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """The device, and what a server may ask of its clients."""
    parser.add_argument(
        "--device", metavar="NAME", help="the RDMA device (default: one that reaches the peer)"
    )
    parser.add_argument("--token", help="a secret that the server knows")
    parser.add_argument("--tls", action="store_true", help="TLS for the bootstrap, with the system's CAs")
    parser.add_argument(
        "--tls-ca", metavar="FILE", help="TLS for the bootstrap, with the CAs in this file (PEM)"
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """TLS of a server."""
    parser.add_argument("--tls-cert", metavar="FILE", help="with --serve: TLS with this certificate (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="with --serve: its key, if it is in another file")


def client_tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    """What ``connect`` is given. Raises :class:`~aiordma.errors.RdmaError` for a file that will not do."""
    if not args.tls and args.tls_ca is None:
        return None
    import ssl

    try:
        return ssl.create_default_context(cafile=args.tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise RdmaError(f"--tls-ca {args.tls_ca}: {error}") from None


def server_tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    """What ``serve`` is given. Raises :class:`~aiordma.errors.RdmaError` for a file that will not do."""
    if args.tls_cert is None:
        if args.tls_key is not None:
            raise RdmaError("--tls-key is of use with --tls-cert only")
        return None
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(args.tls_cert, args.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise RdmaError(f"--tls-cert {args.tls_cert}: {error}") from None
    return context
