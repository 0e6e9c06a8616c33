"""What ``make fuzz`` runs: the fuzzer of usroce's packet path (tests/fuzz), with clang, libFuzzer, ASan and UBSan.

    python -m tools.fuzz [SECONDS] [--keep]

It begins with the inputs in tests/fuzz/corpus, and keeps what it finds of interest in ``build-fuzz/corpus`` from
run to run.  An input that breaks something ends the run and is left in ``build-fuzz``; once that is repaired it
belongs into tests/fuzz/corpus, under a name that says what it was, for the C tests run all of those.  ``--keep``
adds what reaches code that nothing in there does.

Standard library only.  Nothing is installed; Debian's packages are clang and libclang-rt-dev.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build-fuzz"
PROGRAM = BUILD / "packets"
FOUND = BUILD / "corpus"
TESTS = ROOT / "tests" / "fuzz"
CORPUS = TESTS / "corpus"
DEVICE = ROOT / "native" / "usroce"

FUZZER = "-fsanitize=fuzzer,address,undefined"
FLAGS = [
    *("-std=gnu11", "-O1", "-g", "-fno-omit-frame-pointer", "-pthread", "-Wall", "-Wextra"),
    *(FUZZER, "-fno-sanitize-recover=undefined", f"-I{DEVICE}"),
    # The clock and the random numbers of the device are those of the test (tests/fuzz/world.c).
    "-Wl,--wrap=now_ns,--wrap=random_u32",
]
OPTIONS = ["-max_len=800", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={BUILD}/"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description="Fuzz usroce's packet path.")
    parser.add_argument("seconds", nargs="?", type=int, default=600, help="how long (default: 600)")
    parser.add_argument("--keep", action="store_true", help="add to tests/fuzz/corpus what reaches new code")
    options = parser.parse_args(arguments)
    compiler = find_compiler()
    if compiler is None:
        print("fuzz: needs clang with libFuzzer (Debian: clang libclang-rt-dev)", file=sys.stderr)
        return 1
    FOUND.mkdir(parents=True, exist_ok=True)
    build(compiler)
    status = run(f"-max_total_time={options.seconds}", "-print_final_stats=1", str(FOUND), str(CORPUS))
    if status:
        print(f"fuzz: a finding, in {BUILD}; to run it again: {PROGRAM} FILE", file=sys.stderr)
    elif options.keep:
        # By the code that is reached, not by how often, so that few are enough.
        status = run("-merge=1", "-use_counters=0", str(CORPUS), str(FOUND))
    return status


def find_compiler() -> str | None:
    """The first clang that has libFuzzer; Debian installs it under its version too."""
    names = ["clang", *(f"clang-{version}" for version in range(30, 11, -1))]
    return next((name for name in names if shutil.which(name) and has_libfuzzer(name)), None)


def has_libfuzzer(compiler: str) -> bool:
    source = "int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { (void)d; (void)n; return 0; }"
    with tempfile.TemporaryDirectory() as folder:
        argv = [compiler, FUZZER, "-x", "c", "-", "-o", f"{folder}/probe"]
        return subprocess.run(argv, input=source.encode(), capture_output=True, check=False).returncode == 0


def build(compiler: str) -> None:
    sources = [*sorted(DEVICE.glob("*.c")), *sorted(TESTS.glob("*.c"))]
    sources.remove(TESTS / "replay.c")  # in place of the fuzzing engine
    subprocess.run([compiler, *FLAGS, "-o", PROGRAM, *sources], check=True)


def run(*arguments: str) -> int:
    """Runs the fuzzer; its exit status."""
    return subprocess.run([str(PROGRAM), *OPTIONS, *arguments], cwd=BUILD, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
