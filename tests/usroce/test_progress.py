"""One-sided operations need nothing of the program they reach, and an idle device costs nothing."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiordma.verbs import WrOpcode, usroce
from tests.usroce.conftest import Target
from tests.usroce.ends import End
from tests.usroce.processes import free_loopback_address

pytestmark = [pytest.mark.device, pytest.mark.usroce]

IDLE = 5.0  # seconds
ROUNDS = 50


def use(target: Target) -> bytearray:
    """Every one-sided operation, all of them done; the memory that must be there now."""
    end = target.end
    memory = bytearray(len(end.memory))
    for number in range(ROUNDS):
        data = os.urandom(1 + number * 40)
        start = 16 + number * 100
        end.write(data, start)
        memory[start : start + len(data)] = data
        assert end.read(len(data), start, local=8192) == data
        assert end.fetch_add(number, 8, local=8) == sum(range(number))
    memory[8:16] = sum(range(ROUNDS)).to_bytes(8, "little")
    big = os.urandom(32768)
    end.write(big, 32768)
    memory[32768:] = big
    assert end.read(32768, 32768) == big
    return memory


def digest(memory: bytearray) -> str:
    return hashlib.sha256(memory).hexdigest()


#: What the target did just before: nothing, or it polled so often that its device's thread stays out.
before = pytest.mark.parametrize("before", ["nothing", "poll"])


@before
@pytest.mark.parametrize("job", ["spin", "compute"])
def test_while_it_computes(target: Target, job: str, before: str) -> None:
    """In a loop that only the peer's write ends: of Python, and of long calls of C that hold Python's lock."""
    target.connect()
    prepare(target, before)
    target.begin(job)
    memory = use(target)
    assert not target.is_over()
    target.end.write(b"\1", 0)
    memory[0] = 1
    assert target.digest() == digest(memory)


@before
@pytest.mark.parametrize("job", ["block", "sleep"])
def test_while_it_sleeps_in_c(target: Target, job: str, before: str) -> None:
    """With and without Python's lock; the sleep ends when we say so."""
    target.connect()
    prepare(target, before)
    target.begin(job)
    memory = use(target)
    assert not target.is_over()
    target.process.tell("")
    assert target.digest() == digest(memory)


def prepare(target: Target, before: str) -> None:
    if before == "poll":
        target.begin("poll")
        target.digest()


# --- messages ------------------------------------------------------------------------------------------------

TURNS = 20
TURN = 0.003  # seconds of a turn in which the receiver's program does not come to its queue
SIZE = 64
READS = 300


@pytest.fixture
def sender(end: End) -> Iterator[End]:
    """Connected to `end`, from another device of this process."""
    with usroce.options(address=free_loopback_address(), shm="0"):
        context = usroce.usroce_device().open()
    with context:
        sender = End(context)
        sender.connect(end.card())
        end.connect(sender.card())
        yield sender


def post_receives(end: End, count: int) -> None:
    region = end.region
    end.qp.post_recv([(1, region.address + at * SIZE, SIZE, region.lkey) for at in range(count)])


def send_for(sender: End, seconds: float, count: int) -> int:
    """Up to `count` messages, one each tenth of a millisecond; returns how many."""
    first = time.perf_counter()
    for number in range(count):
        if time.perf_counter() - first > seconds:
            return number
        sender.post(WrOpcode.SEND, SIZE)
        while time.perf_counter() - first < number / 10_000:
            sender.cq.poll()
    return count


def test_messages_to_a_program_with_long_turns_wake_nobody_else(end: End, sender: End) -> None:
    """It will find them when it polls again: the device's thread would only take time from its turn."""
    post_receives(end, 64)
    sent = waking = 0
    for _ in range(TURNS):
        for _ in range(16):
            assert not end.cq.poll()
        before = thread_wakeups(end)
        in_turn = send_for(sender, TURN, 30)
        waking += thread_wakeups(end) - before
        end.complete(in_turn)
        sender.cq.poll()
        post_receives(end, in_turn)
        sent += in_turn
    assert waking < sent / 2


def test_a_program_that_polls_now_and_then_is_read_from_at_once(end: End, sender: End) -> None:
    """Not just when it polls, though it never stays away for long."""
    at_once = 0
    for _ in range(READS):
        for _ in range(16):
            assert not end.cq.poll()
        turn = time.perf_counter() + 0.0017
        sender.post(WrOpcode.RDMA_READ, SIZE)
        found = []
        while time.perf_counter() < turn:
            found += sender.cq.poll()
        at_once += len(found)
        sender.complete(1 - len(found))
    assert at_once > READS / 2


def test_messages_to_a_program_that_does_not_come_back_are_acknowledged(end: End, sender: End) -> None:
    """By the device's thread, soon: the sender does not have to ask again."""
    post_receives(end, 60)
    for _ in range(20):
        for _ in range(1000):
            assert not end.cq.poll()
        for _ in range(3):
            sender.post(WrOpcode.SEND, SIZE)
            sender.complete()
        end.complete(3)
    assert usroce.counters(sender.context).timeouts < 20, "60 messages, and a machine that may stall"


@pytest.mark.timeout(20)
def test_looking_at_a_program_that_polls_is_counted_as_it_happens(end: End) -> None:
    """Once in a while; not all of it when the program stops, however long that takes."""
    for _ in range(1000):
        assert not end.cq.poll()
    first = thread_wakeups(end)
    while thread_wakeups(end) < first + 3:
        assert not end.cq.poll()


# --- idle ----------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far: proc(5), stat, utime and stime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_wakeups(end: End) -> int:
    return usroce.counters(end.context).thread_wakeups


def test_idle_costs_nothing(target: Target) -> None:
    """Connected and armed on this side, asleep on the other; both used just before."""
    target.connect()
    target.begin("sleep")
    use(target)
    target.end.cq.arm()
    idle(target)
    target.process.tell("")
    target.digest()


def test_idle_costs_nothing_after_polling_that_just_stops(target: Target) -> None:
    """Nobody says that no more polls will come: the device's thread finds out, and sleeps then."""
    target.connect()
    target.begin("poll")
    target.digest()
    for _ in range(1000):
        assert not target.end.cq.poll()
    idle(target)


def idle(target: Target) -> None:
    """Does nothing for a while, and looks at what that cost on both sides."""
    first = thread_wakeups(target.end)
    ours, theirs = time.process_time(), cpu_seconds(target.process.pid)
    time.sleep(IDLE)  # what is measured
    ours, theirs = time.process_time() - ours, cpu_seconds(target.process.pid) - theirs
    assert ours < IDLE / 100, f"{ours:.3f} s of processor time in {IDLE:.0f} s"
    assert theirs < IDLE / 100, f"{theirs:.3f} s of the target's"
    assert thread_wakeups(target.end) - first <= 10, (  # it looks a few times; a timer would be hundreds
        "the thread finds out that it has nothing to do, and sleeps"
    )


def test_idle_device_without_a_queue_pair_has_no_thread(address: str) -> None:
    threads = len(os.listdir("/proc/self/task"))
    with usroce.options(address=address):
        context = usroce.usroce_device().open()
    with context:
        assert len(os.listdir("/proc/self/task")) == threads
