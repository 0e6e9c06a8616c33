"""Docstrings for mkdocstrings: roles such as :class:`~a.B` become links, ``text::`` opens a literal block.

A name is looked up where the docstring stands, then in its class, its module, its packages and the errors, as a
reader would.  What belongs to aiordma becomes a link to the reference, and mkdocs complains if
that has no such entry; what belongs to others (asyncio, ssl) stays code, for links out of the site would need the
network when it is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(class|func|meth|attr|data|exc|mod|obj):`(~?)([\w.]+)`")
_LITERAL = re.compile(r"::(?=\n\n +)")
_PACKAGE = "aiordma"


class Roles(griffe.Extension):
    """Rewrites every docstring once the package is loaded, for only then all names are known."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """A module, class, function or attribute of the package."""
        if obj.docstring is None:
            return
        package = loader.modules_collection[_PACKAGE]
        text = _ROLE.sub(lambda match: _link(obj, package, *match.groups()), obj.docstring.value)
        obj.docstring.value = _LITERAL.sub(":", text)


def _link(obj: griffe.Object, package: griffe.Module, role: str, tilde: str, name: str) -> str:
    shown = f"`{name.rpartition('.')[2] if tilde else name}`"
    first = name.partition(".")[0]
    foreign = first != name and first != _PACKAGE and _find(obj, package, first) is None
    if role == "mod" or foreign:
        return shown
    return f"[{shown}][{_find(obj, package, name) or name}]"


def _find(obj: griffe.Object, package: griffe.Module, name: str) -> str | None:
    """The path of what ``name`` means in the docstring of ``obj``; None for what is not ours."""
    if name.startswith(f"{_PACKAGE}."):
        return _member(package, name.removeprefix(f"{_PACKAGE}."))
    for scope in _scopes(obj, package):
        found = _member(scope, name)
        if found is not None:
            return found
    return None


def _scopes(obj: griffe.Object, package: griffe.Module) -> Iterator[griffe.Object]:
    scope: griffe.Object | None = obj
    while scope is not None and scope is not package:
        yield scope
        scope = scope.parent
    yield package.modules["errors"]
    yield package


def _member(scope: griffe.Object, name: str) -> str | None:
    """The canonical path of a name below ``scope``, through imports and base classes."""
    found: Any = scope
    for part in name.split("."):
        try:
            found = found.all_members[part] if found.is_class else found.members[part]
            found = found.final_target if found.is_alias else found
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            return None
    if found.is_module and found.name in found.members:  # of aiordma.connect the package keeps the function
        found = found.members[found.name]
    path: str = found.path
    return path if path.partition(".")[0] == _PACKAGE else None
