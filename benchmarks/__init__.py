"""Measurements beside C, pyverbs and TCP, on one device and in one run: `python -m benchmarks.core`.

`python -m benchmarks.usroce` puts the user-space device beside plain UDP.
"""
