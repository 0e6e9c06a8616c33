# Everything sets itself up: tools/setup.py installs what is missing, and is quick when nothing is.
# ARGS= is passed on:  make test ARGS="-k credit -x"    make bench ARGS=--help

PYTHON3 ?= python3
ARGS ?=

PY := .venv/bin/python
RXE := $(PY) -m tools.rxe run --

# The virtual machine is slow at compiling: byte code must be written. (Python takes empty for unset.)
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test lint docs sanitize fuzz bench bench-rxe bench-usroce bench-messaging setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      a first look: two processes on usroce, the device in user space"
	@echo "make test      the test suite: without a device, on usroce, on soft RoCE [ARGS=\"pytest arguments\"]"
	@echo "make lint      ruff, mypy --strict, the C code with -Werror, the documentation"
	@echo "make docs      the documentation as a site, in build-docs/"
	@echo "make sanitize  the tests with the C code under ASan and UBSan [ARGS=\"pytest arguments\"]"
	@echo "make fuzz      hostile packets, invented by libFuzzer; needs clang [ARGS=\"SECONDS\"]"
	@echo "make bench     all benchmarks but bench-rxe; fills docs/performance.md [ARGS=\"benchmarks arguments\"]"
	@echo "make bench-rxe single operations on a soft-RoCE device beside C and pyverbs [ARGS=\"benchmarks.core arguments\"]"
	@echo "make bench-usroce  the user-space device beside plain UDP [ARGS=\"benchmarks.usroce arguments\"]"
	@echo "make bench-messaging  aiordma beside streams, Protocol, ZeroMQ, gRPC, UCX [ARGS=\"benchmarks.messaging arguments\"]"
	@echo "make setup     only what the others do first: packages, .venv, extension"
	@echo "make clean     removes everything built, and .venv"

demo:
	@$(PYTHON3) tools/setup.py --for demo
	@AIORDMA_DEVICE=$${AIORDMA_DEVICE:-usroce0} $(PY) examples/demo.py $(ARGS)

test:
	@$(PYTHON3) tools/setup.py --for test
	@$(PY) -m tools.suite test $(ARGS)

lint:
	@$(PYTHON3) tools/setup.py --for lint
	@$(PY) -m tools.suite lint

docs:
	@$(PYTHON3) tools/setup.py --for docs
	@$(PY) -m tools.suite docs

sanitize:
	@$(PYTHON3) tools/setup.py --for test
	@$(PY) -m tools.suite sanitize $(ARGS)

fuzz:
	@$(PYTHON3) tools/setup.py --for test
	@$(PY) -m tools.fuzz $(ARGS)

bench:
	@$(PYTHON3) tools/setup.py --for bench
	@$(PY) -m benchmarks $(ARGS)

bench-rxe:
	@$(PYTHON3) tools/setup.py --for bench
	@$(RXE) $(PY) -m benchmarks.core $(ARGS)

bench-usroce:
	@$(PYTHON3) tools/setup.py --for bench
	@$(PY) -m benchmarks.usroce $(ARGS)

bench-messaging:
	@$(PYTHON3) tools/setup.py --for bench
	@$(PY) -m benchmarks.messaging $(ARGS)

setup:
	@$(PYTHON3) tools/setup.py --for lint

clean:
	rm -rf build build-* dist .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f aiordma/_native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
