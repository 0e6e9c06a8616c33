"""The virtual machine: how QEMU and the file server are started, in which ways, and how they end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.rxe import agent, kernel, packages
from tools.rxe.accel import kvm_works
from tools.rxe.common import RxeError, cache_dir, find_program, say, tail
from tools.rxe.supervisor import BootError, Job, Supervisor, raw_terminal

VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
REPOSITORY = Path(__file__).resolve().parents[2]
# Never shared writable: the first would undo the overlay, the others are the guest's own.
UNSHARED = ("proc", "sys", "dev", "run")

KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=3 panic=-1 oops=panic mitigations=off init_on_alloc=0 nowatchdog audit=0 "
    "apparmor=0 rcupdate.rcu_expedited=1 random.trust_cpu=on"
)
# Emulated CPUs fail the kernel's test for synchronous TSCs, and every look at a clock then is a system call
# and an emulated HPET access.
TCG_ARGUMENTS = "tsc=reliable no_timer_check"
# With ERMS both kernel and libc copy by "rep movsb", which TCG does byte by byte; MPX and PKU only make
# the state larger that is saved at each context switch.
TCG_CPU = "max,erms=off,fsrm=off,mpx=off,pku=off"
TCG_BUFFER_MIB = 1024
MAX_CPUS = 4


@dataclass(frozen=True)
class Way:
    """One way to run a guest."""

    accelerator: str  # "kvm" or "tcg"
    filesystem: str  # "virtiofs" or "9p"


@dataclass(frozen=True)
class Size:
    memory: int  # MiB
    cpus: int


def default_size() -> Size:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = min(4096, max(1024, pages // 2 // (1 << 20)))
    return Size(memory, max(2, min(MAX_CPUS, len(os.sched_getaffinity(0)))))


def set_up() -> kernel.Kernel:
    """Install and fetch what is missing; a few stat calls when nothing is."""
    packages.install_missing(machine=True)
    return kernel.ready_kernel(cache_dir())


def run(job: Job, size: Size) -> int:
    """Execute the job in a guest, trying the next way when one does not boot."""
    image = set_up()
    for way in ways():
        say(f"booting Linux {image.release} with soft-RoCE in QEMU ({way.accelerator}, {way.filesystem})")
        try:
            return run_once(image, job, size, way)
        except BootError as error:
            say(str(error))
    raise RxeError("no guest came up, in any of these ways")


def ways() -> list[Way]:
    # virtiofsd serves as root only; it is several times faster than 9p where many files are looked at
    filesystem = "virtiofs" if os.geteuid() == 0 and VIRTIOFSD.exists() else "9p"
    found = [Way("tcg", filesystem)] * 2
    if kvm_works(qemu_program(), cache_dir()):
        found.insert(0, Way("kvm", filesystem))
    if filesystem == "virtiofs":
        found.append(Way("tcg", "9p"))
    return found


def qemu_program() -> str:
    program = find_program("qemu-system-x86_64")
    if program is None:
        raise RxeError("no qemu-system-x86_64 here: apt-get install qemu-system-x86")
    return program


def run_once(image: kernel.Kernel, job: Job, size: Size, way: Way) -> int:
    with tempfile.TemporaryDirectory(prefix="rxe-") as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        console = scratch / "console"
        console.touch()
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            initramfs = scratch / "initramfs"
            initramfs.write_bytes(image.initramfs.read_bytes() + job_archive(image, job, way))
            files = stack.enter_context(file_server(scratch, way))
            argv = [*qemu_command(image, size, way), "-initrd", str(initramfs), *files]
            argv += ["-serial", f"file:{console}", *channel_options(theirs.fileno())]
            stack.enter_context(process(argv, scratch / "qemu.log", theirs.fileno()))
        if job.terminal:
            stack.enter_context(raw_terminal())
        try:
            return Supervisor(ours, console, job, flush_files=way.filesystem == "9p").run()
        except RxeError as error:
            raise type(error)(f"{error}\n{last_words(scratch)}".rstrip()) from None


def last_words(scratch: Path) -> str:
    """From where the guest's kernel went wrong, if it did; else the last messages."""
    console = (scratch / "console").read_text(errors="replace")
    trouble = re.search(r"^.*(?:Kernel panic|BUG:|Oops).*$", console, re.MULTILINE)
    if trouble:
        return tail("\n".join(console[trouble.start() :].splitlines()[:25]), 25)
    return tail(console + (scratch / "qemu.log").read_text(errors="replace"))


def job_archive(image: kernel.Kernel, job: Job, way: Way) -> bytes:
    """The part of the initramfs that tells guest-init.sh about this run."""
    contents = {
        "job/filesystem": way.filesystem,
        "job/shared": "".join(f"{path}\n" for path in shared_directories(job.directory)),
        "job/modules": str(image.modules),
        "job/python": os.path.realpath(sys.executable),
    }
    files = {name: os.fsencode(text) for name, text in contents.items()}
    files["job/agent.py"] = Path(agent.__file__).read_bytes()
    return kernel.archive(files, directories=("job",))


def shared_directories(directory: Path) -> list[Path]:
    """The repository and the working directory, outer before inner."""
    wanted = {REPOSITORY, directory}
    if any("\n" in str(path) for path in wanted):
        raise RxeError("a line break in the path of the working directory cannot be handled")
    return sorted(path for path in wanted if len(path.parts) > 1 and path.parts[1] not in UNSHARED)


def qemu_command(image: kernel.Kernel, size: Size, way: Way) -> list[str]:
    argv = [qemu_program(), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-smp", str(size.cpus), "-m", f"{size.memory}M", "-kernel", str(image.image)]
    machine = "q35,usb=off,vmport=off,smbus=off,sata=off"
    if way.accelerator == "kvm":
        arguments = KERNEL_ARGUMENTS
        argv += ["-accel", "kvm", "-cpu", "host"]
    else:
        arguments = f"{KERNEL_ARGUMENTS} {TCG_ARGUMENTS}"
        argv += ["-accel", f"tcg,thread=multi,tb-size={TCG_BUFFER_MIB}", "-cpu", TCG_CPU]
    if way.filesystem == "virtiofs":
        # virtiofsd reads and writes the guest's memory
        machine += ",memory-backend=memory"
        argv += ["-object", f"memory-backend-memfd,id=memory,size={size.memory}M,share=on"]
    return [*argv, "-machine", machine, "-append", arguments]


def channel_options(fd: int) -> list[str]:
    return [
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,fd={fd}"),
        *("-device", f"virtserialport,chardev=agent,name={agent.PORT_NAME}"),
    ]


@contextlib.contextmanager
def file_server(scratch: Path, way: Way) -> Iterator[list[str]]:
    """Serve the root file system; yields QEMU's options for it."""
    if way.filesystem == "9p":
        backend = "local,id=host,path=/,security_model=none,multidevs=remap"
        yield ["-fsdev", backend, "-device", "virtio-9p-pci,fsdev=host,mount_tag=host"]
        return
    path = scratch / "virtiofs"
    with contextlib.ExitStack() as stack:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            argv = [str(VIRTIOFSD), f"--fd={listener.fileno()}", "-o", "source=/"]
            # a chroot, not namespaces: those are refused in containers and chroots
            argv += ["-o", "sandbox=chroot", "-o", "cache=always"]
            stack.enter_context(process(argv, scratch / "virtiofsd.log", listener.fileno()))
        # The daemon alone holds the listener now: if it dies, QEMU is refused instead of waiting for ever.
        device = "vhost-user-fs-pci,chardev=host,tag=host"
        yield ["-chardev", f"socket,id=host,path={path}", "-device", device]


@contextlib.contextmanager
def process(argv: Sequence[str], log: Path, fd: int) -> Iterator[subprocess.Popen[bytes]]:
    """A helper in a process group of its own, ended with us: by us, or by the kernel should we be killed."""
    setpriv = find_program("setpriv")
    guard = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
    with open(log, "wb") as output:
        child = subprocess.Popen(
            [*guard, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(fd,),
            start_new_session=True,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
