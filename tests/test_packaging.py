"""What is installed: the wheel's files, what a bare import costs, and one version everywhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    *("aiordma", "native", "tests/fuzz", "tests/native"),
    *("meson.build", "pyproject.toml", "README.md", "LICENSE"),
)

MODULES = tuple(
    f"aiordma/_native/{name}"
    for name in (
        *("_datapath.abi3.so", "_frames.abi3.so", "_ledger.abi3.so", "_memory.abi3.so", "_verbs.abi3.so"),
        "libusroce.so",
    )
)

#: Those of a sanitizer run, which is not to reach compilers, and those that would show another package.
NOT_FOR_BUILDS = ("LD_PRELOAD", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONMALLOC")


def run_python(code: str) -> str:
    """Run code in a new interpreter that sees the same package."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_without_libibverbs() -> None:
    printed = run_python(
        "import aiordma\n"
        "from aiordma.verbs import provider\n"
        "try:\n"
        "    provider('libnot-there.so')\n"
        "except aiordma.errors.LibraryError as error:\n"
        "    print(error)\n"
    )
    assert "libnot-there.so cannot be used" in printed
    assert "apt install libibverbs1" in printed


def test_bare_import_is_light() -> None:
    heavy = "{'asyncio', 'pydantic', 'uvloop', 'ssl', 'cffi', 'numpy', 'aiordma._native'}"
    assert run_python(f"import aiordma, sys; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


def test_bare_import_loads_the_settings_and_the_errors_only() -> None:
    loaded = run_python(
        "import aiordma, sys\n"
        "print(*sorted(name for name in sys.modules if name.startswith('aiordma')))\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))\n"
    ).splitlines()
    assert loaded[0].split() == ["aiordma", "aiordma._version", "aiordma.config", "aiordma.errors"]
    # Beside the package: what .pth files of the environment load, whatever is imported.
    bare = run_python("import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert set(loaded[1].split()) - set(bare) == {"aiordma"}


@pytest.mark.parametrize("name", ["Connection", "Lease", "RemoteRegion", "devices"])
def test_pydantic_is_for_the_bootstrap(name: str) -> None:
    printed = run_python(f"from aiordma import {name}; import sys; print('pydantic' in sys.modules)")
    assert printed == "False\n"


def test_every_public_name_is_there_and_stays_the_same_object() -> None:
    printed = run_python(
        "import aiordma\n"
        "assert set(aiordma.__all__) <= set(dir(aiordma))\n"
        "first = {name: getattr(aiordma, name) for name in aiordma.__all__}\n"
        "import aiordma.connect\n"
        "print(all(getattr(aiordma, name) is value for name, value in first.items()))\n"
        "print(callable(aiordma.connect))\n"
    )
    assert printed.split() == ["True", "True"]


def test_one_version() -> None:
    import aiordma

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    built = re.search(r"^\s*version: '([^']+)'", (ROOT / "meson.build").read_text(encoding="utf-8"), re.M)
    assert built is not None
    assert project == built[1] == aiordma.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built from a copy of the checkout, with what lies about in it."""
    if importlib.util.find_spec("mesonpy") is None:
        pytest.skip("meson-python is not installed in this environment")
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        else:
            shutil.copy(ROOT / name, source / name)
    for package in [path.parent for path in (source / "aiordma").rglob("__init__.py")]:
        (package / "__pycache__").mkdir(exist_ok=True)
        (package / "__pycache__" / "junk.pyc").touch()
    for module in MODULES:
        (source / module).write_bytes(b"of an earlier build")
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_BUILDS}
    # meson and ninja are beside the interpreter, whose environment need not be active
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}"
    argv = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp)]
    result = subprocess.run(
        [*argv, str(source)], env=environment, capture_output=True, text=True, timeout=110
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    (path,) = tmp.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "aiordma"
    files = {*package.rglob("*.py"), *package.rglob("*.pyi"), package / "py.typed"}
    expected = {str(path.relative_to(ROOT)) for path in files} - {"aiordma/_native/build_ffi.py"}
    expected |= set(MODULES)
    found = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert found == expected


def test_wheel_has_new_modules(wheel: zipfile.ZipFile) -> None:
    for module in MODULES:
        assert wheel.read(module).startswith(b"\x7fELF")


def test_wheel_serves_later_pythons(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None
    assert "-cp311-abi3-linux" in wheel.filename


def test_wheel_has_licence_command_and_plugin(wheel: zipfile.ZipFile) -> None:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    entries = re.sub(r"\s*=\s*", " = ", wheel.read(f"{folder}/entry_points.txt").decode())
    assert "[console_scripts]\naiordma = aiordma.__main__:main\n" in entries
    assert "[pytest11]\naiordma.pytest_plugin = aiordma.pytest_plugin\n" in entries
