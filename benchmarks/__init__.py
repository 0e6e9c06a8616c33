"""Measurements beside C, TCP and others' packages, in one run and as ratios: `python -m benchmarks` for all.

`acceptance.py` is what aiordma set out to reach, contest by contest; `subjects.py` what is measured there,
`rounds.py` how, `page.py` what is made of it. With a command of their own: `messaging.py` (messages beside what
services are written with today), `usroce.py` (the device in user space beside plain UDP), `many_peers.py`, and
`core.py` (single operations beside C and pyverbs, for soft RoCE and cards).
"""
