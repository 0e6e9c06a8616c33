"""Imports go strictly downward. A new file in aiordma must be given its place in the table below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "aiordma"

#: From the bottom. A name stands for a module or for a package with all in it; modules of one row do not
#: import each other, those of one package may.
LAYERS = (
    ("errors", "_version"),
    ("config", "buffers"),
    ("_native",),
    ("verbs", "protocol"),
    ("registrations",),
    ("cq_reactor", "mr_pool"),
    ("staging", "shared_receives"),
    ("adapter",),
    ("send_queue",),
    ("receive_queue",),
    ("regions", "large_messages"),
    ("transport",),
    ("connect", "stream_transport"),
    ("rpc", "streams"),
    ("diagnostics", "testing"),
    ("pytest_plugin",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}

#: Of the compiled modules, all but _frames and _ledger: those that know of verbs, memory or event loops.
NOT_ARITHMETIC = ("ffi", "lib", "_verbs", "_memory", "_datapath")

#: Beyond the order: what a layer must not know of at all.
FORBIDDEN = {
    "protocol": {"asyncio", "aiordma.verbs", *(f"aiordma._native.{part}" for part in NOT_ARITHMETIC)},
    "verbs": {"asyncio"},
}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def place(path: Path) -> str:
    """The entry of the table that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those in a module and in its functions, without what only a type checker sees."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    unseen = node.body if isinstance(node, ast.If) and is_type_checking(node) else []
    for child in ast.iter_child_nodes(node):
        if child not in unseen:
            yield from import_statements(child)


def imported_modules(source: str, package: tuple[str, ...]) -> set[str]:
    """Absolute names of all that a file of `package` imports; for `from x import y` both x and x.y."""
    names: set[str] = set()
    for statement in import_statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            names.update(alias.name for alias in statement.names)
            continue
        base = package[: len(package) - statement.level + 1] if statement.level else ()
        module = ".".join([*base, *([statement.module] if statement.module else [])])
        names.add(module)
        names.update(f"{module}.{alias.name}" for alias in statement.names)
    return names


def violations(source: str, path: Path) -> list[str]:
    here = place(path)
    names = imported_modules(source, ("aiordma", *path.relative_to(PACKAGE).parent.parts))
    ours = {name.split(".")[1] for name in names if name.startswith("aiordma.")}
    found = [f"{here} imports {name} from the package itself" for name in sorted(ours - set(RANK))]
    if "aiordma" in names and not ours:
        found.append(f"{here} imports the package itself")
    for layer in sorted(ours.intersection(RANK) - {here}):
        if RANK[layer] >= RANK[here]:
            found.append(f"{here} (rank {RANK[here]}) imports {layer} (rank {RANK[layer]})")
    for forbidden in sorted(FORBIDDEN.get(here, ())):
        if any(name == forbidden or name.startswith(f"{forbidden}.") for name in names):
            found.append(f"{here} must not import {forbidden}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    assert place(path) in RANK, f"{path} has no place in the table of layers (in this file)"
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("from .transport import Connection", "config.py"),
        ("import aiordma.transport", "send_queue.py"),
        ("from . import connect", "errors.py"),
        ("from .. import transport", "verbs/device.py"),
        ("from aiordma.mr_pool import Lease", "cq_reactor.py"),
        ("def late():\n    from .connect import connect", "mr_pool.py"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from .connect import connect", "mr_pool.py"),
        ("import asyncio", "protocol/credit.py"),
        ("from asyncio import sleep", "verbs/queue_pair.py"),
        ("from .._native import lib", "protocol/credit.py"),
        ("from ..verbs import Access", "protocol/credit.py"),
        ("from aiordma import connect", "errors.py"),
        ("from . import Connection", "mr_pool.py"),
    ],
)
def test_upward_import_is_found(source: str, file: str) -> None:
    assert violations(source, PACKAGE / file)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("if TYPE_CHECKING:\n    from .transport import Connection", "regions.py"),
        ("from .device import Context", "verbs/memory.py"),
        ("from ..errors import DeviceError", "verbs/memory.py"),
        ("from . import errors", "connect.py"),
        ("import asyncio", "connect.py"),
    ],
)
def test_downward_import_is_allowed(source: str, file: str) -> None:
    assert violations(source, PACKAGE / file) == []
