"""Measurements beside C, pyverbs and TCP, on one device and in one run: `python -m benchmarks.core`.

`python -m benchmarks.usroce` puts the user-space device beside plain UDP,
`python -m benchmarks.messaging` messages of aiordma beside what services are written with today.
"""
