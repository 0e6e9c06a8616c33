"""What ``make test``, ``lint``, ``docs`` and ``sanitize`` run, once tools/setup.py has made all ready.

*test*: the tests that need no device run on this machine, then those marked ``device``: on usroce, here, and on
rxe, through tools.rxe.  Each part is an ordinary pytest run; the last line adds them up.  If AIORDMA_DEVICE
names a device, the device tests run on that one only.

*sanitize*: the same with the C code built under ASan and UBSan, put beside links to the Python files as a
package of its own (``build-asan/site``).  tests/protocol is left out: those layers import no C code, which
tests/test_layers.py sees to.  The device tests run on usroce only, here: our C code is the same above rxe, and
under emulation instrumentation is dear.  The interpreter is not instrumented, so the runtime is preloaded; its
leak detection is off, for CPython leaves memory behind on purpose at exit.  The C test programs
(tests/native), which have no interpreter in them, are checked for leaks.  Reports are written to files,
since pytest holds the standard streams of a process that ASan ends.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.setup import PYTHON, ROOT, VENV, SetupError, build, built_modules, tool_environment

REPORTS = ROOT / "build"
ASAN = ROOT / "build-asan"
SITE = ASAN / "site"
SITE_DOCS = ROOT / "build-docs"

USROCE = {"AIORDMA_DEVICE": "usroce0", "AIORDMA_REQUIRE": "usroce"}
#: usroce has all tests on both event loops; where they take long, each has one of the two (tests/conftest.py).
EITHER_LOOP = {"AIORDMA_LOOPS": os.environ.get("AIORDMA_LOOPS", "either")}
#: An emulated machine takes an hour for all: of the layers that know no device, it has every fourth test.
SAMPLE = {"AIORDMA_SAMPLE": os.environ.get("AIORDMA_SAMPLE", "4")}
NO_USROCE = {"AIORDMA_USROCE": "0", "AIORDMA_REQUIRE": ""}

RXE = [str(PYTHON), "-m", "tools.rxe"]
RXE_FAILED = 125
DEADLINE = 3600  # seconds, for one run in a virtual machine

PYTEST_FAILED = 1
PYTEST_NONE_COLLECTED = 5


@dataclass(frozen=True)
class Outcome:
    """How one pytest run ended. `counts` is empty if it did not get as far as writing its report."""

    name: str
    status: int
    counts: Counter[str]

    @property
    def ok(self) -> bool:
        return self.status in (0, PYTEST_NONE_COLLECTED)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.suite")
    parser.add_argument("action", choices=["test", "lint", "docs", "sanitize"])
    parser.add_argument("pytest", nargs=argparse.REMAINDER, metavar="PYTEST ARGUMENTS")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    try:
        if options.action == "lint":
            return lint()
        if options.action == "docs":
            return docs()
        run = test if options.action == "test" else sanitize
        return run(options.pytest)
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


def say(message: str) -> None:
    print(f"suite: {message}", flush=True)


# Tests


def test(arguments: Sequence[str]) -> int:
    started = time.monotonic()
    say("tests that need no device")
    outcomes = [pytest("native", with_marker(arguments, "not device"))]
    selected = with_marker(arguments, "device")
    wanted = os.environ.get("AIORDMA_DEVICE", "")
    if wanted and Path("/sys/class/infiniband", wanted).exists():
        say(f"tests on {wanted} of this machine")
        return total([*outcomes, pytest("device", selected)], time.monotonic() - started)
    if wanted in ("", USROCE["AIORDMA_DEVICE"]) and device_tests_match(selected, USROCE):
        say("tests that need a device, on usroce")
        outcomes.append(pytest("usroce", selected, settings=USROCE))
    if wanted != USROCE["AIORDMA_DEVICE"] and device_tests_match(selected, NO_USROCE):
        outcomes.append(rxe_outcome(selected))
    return total(outcomes, time.monotonic() - started)


def with_marker(arguments: Sequence[str], expression: str) -> list[str]:
    """The arguments with a marker expression, joined to the one that is there; pytest takes only the last."""
    result = list(arguments)
    if "-m" in result[:-1]:
        at = result.index("-m")
        expression = f"({result[at + 1]}) and ({expression})"
        del result[at : at + 2]
    return [*result, "-m", expression]


def device_tests_match(arguments: Sequence[str], settings: Mapping[str, str]) -> bool:
    """Whether there is anything to run on such a device, or to boot a machine for."""
    argv = [str(PYTHON), "-m", "pytest", "--collect-only", "-q", *arguments]
    environment = {**os.environ, **settings}
    done = subprocess.run(argv, env=environment, capture_output=True, check=False)
    return done.returncode != PYTEST_NONE_COLLECTED


def rxe_outcome(arguments: Sequence[str]) -> Outcome:
    say("tests that need a device, on rxe (tools.rxe)")
    settings = {"AIORDMA_REQUIRE": "rxe"} | EITHER_LOOP | SAMPLE
    outcome = pytest("rxe", arguments, launcher=rxe(), settings=settings)
    if outcome.status == RXE_FAILED and not os.environ.get("AIORDMA_REQUIRE") and rxe_cannot_be_had():
        say("soft-RoCE cannot be had here (see above): the tests on rxe are skipped")
        return pytest("rxe", arguments, settings=NO_USROCE)
    return outcome


def rxe() -> list[str]:
    return [*RXE, "run", "--deadline", str(DEADLINE), "--"]


def rxe_cannot_be_had() -> bool:
    """Whether it was for want of a virtual machine; one that dies under a test is a failure."""
    return subprocess.run([*RXE, "setup"], check=False).returncode != 0


def pytest(
    name: str,
    arguments: Sequence[str],
    launcher: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Outcome:
    """One pytest run on the terminal, as it is; `settings` are set for it alone, not for its launcher."""
    report = REPORTS / f"tests-{name}.xml"
    report.unlink(missing_ok=True)
    environment = ["env", *(f"{key}={value}" for key, value in settings.items())] if settings else []
    argv = [*launcher, *environment, str(PYTHON), "-m", "pytest", f"--junitxml={report}", *arguments]
    status = subprocess.run(argv, check=False).returncode
    return Outcome(name, status, read_counts(report))


def read_counts(report: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    if report.exists():
        for suite in ElementTree.parse(report).iter("testsuite"):
            counts += Counter(
                {key: int(suite.get(key, 0)) for key in ("failures", "errors", "skipped", "tests")}
            )
    return counts


def total(outcomes: Sequence[Outcome], seconds: float) -> int:
    """Print the last line, in pytest's form. Returns the exit status."""
    counts = sum((outcome.counts for outcome in outcomes), Counter[str]())
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    parts = [(counts["failures"], "failed"), (passed, "passed"), (counts["skipped"], "skipped")]
    words = [f"{number} {word}" for number, word in [*parts, (counts["errors"], "errors")] if number]
    broken = [outcome for outcome in outcomes if not outcome.ok]
    for outcome in broken:
        if not outcome.counts or outcome.status != PYTEST_FAILED:
            words.append(f"{outcome.name} tests broke off with status {outcome.status}")
    if not counts["tests"]:
        words.append("no tests ran")
    each = ", ".join(f"{outcome.name} {outcome.counts['tests']}" for outcome in outcomes)
    line = f" {', '.join(words)} in {seconds:.2f}s ({each}) "
    print(line.center(100, "="), flush=True)
    return 1 if broken or not counts["tests"] else 0


# Lint


def lint() -> int:
    """Every check, even after one failed."""
    failed = []
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        say(command)
        program, *arguments = command.split()
        if subprocess.run([str(VENV / "bin" / program), *arguments], check=False).returncode:
            failed.append(command)
    say("C code with -Wall -Wextra -Werror")
    try:
        build("build-werror", "-Dwerror=true", "-Dwarning_level=2")
    except SetupError as error:
        say(str(error))
        failed.append("C code")
    if docs():
        failed.append("documentation")
    say(f"lint failed: {', '.join(failed)}" if failed else "lint: all clean")
    return 1 if failed else 0


# Documentation


def docs() -> int:
    """The site, in build-docs/; a link that leads nowhere is an error. Needs no network."""
    say("documentation (mkdocs)")
    argv = [str(PYTHON), "-m", "mkdocs", "build", "--strict", "--quiet"]
    # The theme announces other generators; which one is used is the affair of pyproject.toml.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    status = subprocess.run(argv, env=environment, check=False).returncode
    if status == 0:
        say(f"the documentation is in {SITE_DOCS.relative_to(ROOT)}/index.html")
    return status


# Sanitize


def sanitize(arguments: Sequence[str]) -> int:
    started = time.monotonic()
    runtime = sanitizer_runtime()
    say("building with ASan and UBSan")
    options = ("-Db_sanitize=address,undefined", "-Db_lundef=false", "-Dbuildtype=debugoptimized")
    build(ASAN.name, *options)
    make_site()
    check_c_programs()
    settings = sanitizer_settings(runtime)
    check_sanitizer_works(settings)
    # ASan's own report of a segmentation fault says more; a test takes its time.
    pytest_options = ["-p", "no:faulthandler", "-o", "pythonpath=", "--timeout=900"]
    pytest_options += ["--ignore=tests/protocol", *arguments]
    say("tests that need no device, under the sanitizers")
    outcomes = [pytest("native-asan", with_marker(pytest_options, "not device"), settings=settings)]
    selected = with_marker(pytest_options, "device")
    if device_tests_match(selected, settings | USROCE):
        say("tests that need a device, on usroce, under the sanitizers")
        outcomes.append(pytest("usroce-asan", selected, settings=settings | USROCE))
    reports = print_reports()
    return max(total(outcomes, time.monotonic() - started), int(reports > 0))


def sanitizer_runtime() -> str:
    """The library to preload: only an instrumented program would load it first by itself."""
    compiler = os.environ.get("CC") or ("cc" if shutil.which("cc") else "gcc")
    argv = [*compiler.split(), "-print-file-name=libasan.so"]
    path = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
    if not Path(path).is_absolute():
        raise SetupError(
            f"{compiler} has no libasan.so: install gcc with its sanitizers (Fedora: libasan libubsan)"
        )
    return os.path.realpath(path)


def make_site() -> None:
    """The package as links to its files, with the instrumented modules."""
    shutil.rmtree(SITE, ignore_errors=True)
    package = ROOT / "aiordma"
    for path in [*package.rglob("*.py"), *package.rglob("*.pyi"), package / "py.typed"]:
        link = SITE / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for module in built_modules(ASAN):
        (SITE / "aiordma" / "_native" / module.name).symlink_to(module)


def check_c_programs() -> None:
    say("the C test programs, with leak detection")
    environment = {**tool_environment(), "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    argv = [str(VENV / "bin" / "meson"), "test", "-C", str(ASAN), "--print-errorlogs"]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupError(f"the C test programs failed:\n{result.stdout[-6000:]}{result.stderr[-2000:]}")


def sanitizer_settings(runtime: str) -> dict[str, str]:
    for report in ASAN.glob("report.*"):
        report.unlink()
    log = f"log_path={ASAN / 'report'}"
    return {
        "AIORDMA_SANITIZE": "1",
        **EITHER_LOOP,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=64:{log}",
        "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:{log}",
        # Each Python object in a block of its own, with poisoned surroundings, not in an arena of many.
        "PYTHONMALLOC": "malloc",
        # The working directory would come before the path, and with it the other build.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": f"{SITE}:{ROOT}:{ROOT / 'examples'}",
    }


#: glue_provider_close() zeroes the table it is given; this one is far too small.
OVERFLOW = """
from aiordma._native import _memory, _verbs
assert {site!r} in _verbs.__file__ and {site!r} in _memory.__file__, _verbs.__file__
small = _verbs.ffi.new("char[16]")
_verbs.lib.glue_provider_close(_verbs.ffi.cast("struct glue_provider *", small))
"""


def check_sanitizer_works(settings: Mapping[str, str]) -> None:
    """A deliberate overflow in our C code must be caught, else a clean run says nothing."""
    environment = {**os.environ, **settings, "ASAN_OPTIONS": "detect_leaks=0"}
    argv = [str(PYTHON), "-c", OVERFLOW.format(site=str(SITE))]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    caught = "heap-buffer-overflow" in result.stderr and "glue_provider_close" in result.stderr
    if result.returncode == 0 or not caught:
        raise SetupError(
            f"ASan is not active: a deliberate overflow was not reported\n{result.stderr[-3000:]}"
        )
    for module in built_modules(ASAN):
        if b"__ubsan_handle" not in module.read_bytes():
            raise SetupError(f"UBSan is not in {module}")
    say("a deliberate overflow is caught: the sanitizers are active")


def print_reports() -> int:
    """What the sanitizers wrote. Returns how many reports there are."""
    reports = sorted(ASAN.glob("report.*"))
    for report in reports:
        say(f"{report.name}:")
        print(report.read_text(encoding="utf-8", errors="replace"), flush=True)
    return len(reports)


if __name__ == "__main__":
    sys.exit(main())
