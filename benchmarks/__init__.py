"""Measurements beside C, pyverbs and TCP, on one device and in one run: `python -m benchmarks.core`."""
