"""``aiordma doctor``: looks for whatever keeps RDMA from working here, and says how to mend it.

Each check is a generator of findings over a :class:`Scene`: what was read of the devices and where to look
for the rest, so that a test can show it another machine. A check that fails itself is a finding as well: on a
broken system the doctor is the one program that must not break.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import resource
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import Config
from ..errors import DeviceError, RdmaError
from ..verbs import LinkLayer, PortAttributes, PortState, Provider, Transport, provider
from ..verbs.gid_choice import Address, choose_gid, interface_addresses
from ..verbs.provider import DEFAULT_LIBRARY, USROCE_LIBRARY, library_paths, usroce_is_off
from .devices import DeviceReport, survey
from .output import add_common_options, print_json, size

HELP = "find out what keeps RDMA from working here, and how to mend it"

Status = Literal["ok", "warning", "problem"]

#: How to get a device where there is none.
SOFT_ROCE = """\
usroce, the device in user space, comes with the package: see above why it is not there
soft RoCE over an ordinary network interface (root; here eth0):
  modprobe rdma_rxe
  rdma link add rxe0 type rxe netdev eth0
without root or the module, from a source tree of aiordma, in a virtual machine:
  python3 -m tools.rxe run -- COMMAND"""

_CAP_NET_ADMIN = 12  # capabilities(7): socket buffers beyond net.core.rmem_max
_CAP_IPC_LOCK = 14  # pinned memory is not counted against RLIMIT_MEMLOCK
_IFF_UP = 0x1  # netdevice(7)
_UNLIMITED = resource.RLIM_INFINITY
_ROCE_UDP_PORT = 4791
_SOCKET_BUFFER = 8 << 20  # bytes that usroce asks for


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis; ``fix`` is None where there is nothing to do, and a hint with status ok."""

    name: str
    status: Status
    found: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """What the checks look at. ``address`` is one of this host or a peer's; None: no particular one.

    ``source`` is libibverbs, or the library that was named; ``usroce`` is the one that comes with the package.
    """

    source: Provider | None
    library_error: str | None
    reports: tuple[DeviceReport, ...]
    list_error: str | None
    address: Address | None = None
    usroce: Provider | None = None
    usroce_error: str | None = None
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")

    @property
    def opened(self) -> list[DeviceReport]:
        """The devices that could be opened."""
        return [report for report in self.reports if report.attributes is not None]

    @property
    def real(self) -> list[DeviceReport]:
        """The devices that are not usroce. Where there are any, usroce excuses none of their faults."""
        return [report for report in self.reports if not report.usroce]


Check = Callable[[Scene], Iterator[Finding]]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this subcommand."""
    add_common_options(parser)
    parser.add_argument(
        "--address",
        type=ipaddress.ip_address,
        metavar="ADDR",
        help="explain the choice of GID for a connection from this local address or to this peer",
    )


def run(args: argparse.Namespace) -> int:
    """Status 1 when one of the findings is a problem, else 0."""
    findings = diagnose(look_around(args.library, args.address))
    healthy = all(finding.status != "problem" for finding in findings)
    if args.json:
        print_json({"ok": healthy, "findings": findings})
    else:
        print("\n".join(line for finding in findings for line in _as_text(finding)))
    return 0 if healthy else 1


def look_around(library: str | None = None, address: Address | None = None) -> Scene:
    """Opens the libraries and their devices; failures are part of the scene."""
    source, library_error = _open(library or DEFAULT_LIBRARY)
    usroce, usroce_error = _open(USROCE_LIBRARY) if _wants_usroce(library) else (None, None)
    if source is not None and source.is_usroce:
        usroce, usroce_error = source, None
    reports: list[DeviceReport] = []
    list_error = None
    for each in dict.fromkeys(filter(None, (source, usroce))):
        try:
            reports += survey(each)
        except RdmaError as error:
            list_error = list_error or str(error)
    return Scene(
        source, library_error, tuple(reports), list_error, address, usroce=usroce, usroce_error=usroce_error
    )


def _wants_usroce(library: str | None) -> bool:
    return library is None and USROCE_LIBRARY in library_paths()


def _open(library: str) -> tuple[Provider | None, str | None]:
    try:
        return provider(library), None
    except RdmaError as error:
        return None, str(error)


def diagnose(scene: Scene) -> list[Finding]:
    """Runs every check."""
    return [finding for check in CHECKS for finding in _guarded(check, scene)]


def _guarded(check: Check, scene: Scene) -> Iterator[Finding]:
    name = check.__name__.removeprefix("check_").replace("_", " ")
    try:
        yield from check(scene)
    except Exception as error:
        yield Finding(name, "problem", f"the check itself failed: {error!r}", "please report this")


def _as_text(finding: Finding) -> Iterator[str]:
    mark = {"ok": "ok", "warning": "WARNING", "problem": "PROBLEM"}[finding.status]
    first, *rest = finding.found.splitlines()
    yield f"{mark:<9}{finding.name}: {first}"
    yield from (f"{'':9}{line}" for line in rest)
    if finding.fix:
        first, *rest = finding.fix.splitlines()
        label = "hint: " if finding.status == "ok" else "fix: "
        yield f"{'':9}{label}{first}"
        yield from (f"{'':9}{' ' * len(label)}{line}" for line in rest)


# --- library and kernel -------------------------------------------------------------------------------


def check_library(scene: Scene) -> Iterator[Finding]:
    """The verbs library can be opened and has every function needed."""
    if scene.source is not None:
        yield Finding("verbs library", "ok", f"{scene.source.path} opens")
        return
    found = (scene.library_error or "cannot be opened").partition("; install it")[0]
    fix = "Debian, Ubuntu: apt install libibverbs1 ibverbs-providers\nFedora, RHEL: dnf install libibverbs"
    if scene.usroce is not None and not _kernel_devices(scene):
        yield Finding("verbs library", "ok", f"{found}; usroce needs none", f"for RDMA hardware:\n{fix}")
    else:
        yield Finding("verbs library", "problem", found, f"{fix}\nanother library: --library PATH")


def check_usroce(scene: Scene) -> Iterator[Finding]:
    """The device in user space: whether it is there, who reaches it, what its sockets are given."""
    if scene.usroce_error is not None:
        status: Status = "warning" if scene.real else "problem"
        found, _, fix = scene.usroce_error.partition("; ")
        yield Finding("usroce", status, found, fix or None)
    elif scene.usroce is None and usroce_is_off():
        yield Finding("usroce", "ok", "switched off by AIORDMA_USROCE=0")
    for report in scene.opened:
        if report.usroce:
            yield _judge_addresses(report)
            yield _judge_udp_port(scene, report.ports[0].lid)
            yield _judge_buffers(scene)


def _judge_addresses(report: DeviceReport) -> Finding:
    addresses = [entry.address for entry in report.gids]
    text = ", ".join(map(str, addresses)) or "none"
    local = (
        "for other machines, name addresses of this one: AIORDMA_USROCE_ADDRESS, Config(usroce_address=...)"
    )
    private = all(address.is_loopback for address in addresses)
    found = f"{text}{': only this machine reaches them' if private else ''}"
    return Finding(f"addresses of {report.name}", "ok", found, local if private else None)


def _judge_udp_port(scene: Scene, port: int) -> Finding:
    """``port`` is the one that a device opened just now was given."""
    name = f"UDP port {_ROCE_UDP_PORT}"
    if port in (0, _ROCE_UDP_PORT):
        return Finding(name, "ok", "free: devices of every kind reach usroce there")
    rxe = [device for device in _kernel_devices(scene) if (_infiniband(scene) / device / "parent").exists()]
    who = f"the kernel's soft RoCE ({', '.join(rxe)})" if rxe else "another process"
    return Finding(
        name,
        "ok",
        f"taken at an address of usroce by {who}: usroce uses another port, which its peers are told",
        "a peer that is no usroce sends to 4791 only and does not reach it: give usroce an address of its own",
    )


def _judge_buffers(scene: Scene) -> Finding:
    limits = [int(_read(scene.proc / f"sys/net/core/{name}") or 0) for name in ("rmem_max", "wmem_max")]
    found = f"net.core.rmem_max {size(limits[0])}, wmem_max {size(limits[1])}"
    found += f"; usroce asks for {size(_SOCKET_BUFFER)}"
    if min(limits) >= _SOCKET_BUFFER or _capable(scene, _CAP_NET_ADMIN):
        return Finding("socket buffers", "ok", found)
    hint = (
        "fewer packets are lost, and sent again, with larger ones, as root: "
        f"sysctl net.core.rmem_max={_SOCKET_BUFFER} net.core.wmem_max={_SOCKET_BUFFER}"
    )
    return Finding("socket buffers", "ok", found, hint)


def check_kernel(scene: Scene) -> Iterator[Finding]:
    """The kernel's RDMA subsystem; a library may also bring its own devices."""
    folder = _infiniband(scene)
    names = _kernel_devices(scene)
    if names:
        yield Finding("kernel devices", "ok", ", ".join(names))
        if not (scene.sys / "class/infiniband_verbs").is_dir():
            yield Finding(
                "kernel modules",
                "problem",
                "the module ib_uverbs, which gives devices to programs, is not loaded",
                "modprobe ib_uverbs",
            )
    elif scene.real:
        yield Finding("kernel devices", "ok", "none; the verbs library brings its own")
    elif scene.reports:
        yield Finding("kernel devices", "ok", "none; usroce is used")
    else:
        what = "is empty" if folder.is_dir() else "does not exist: no RDMA module is loaded"
        yield Finding("kernel devices", "warning", f"{folder} {what}")


def _infiniband(scene: Scene) -> Path:
    return scene.sys / "class/infiniband"


def _kernel_devices(scene: Scene) -> list[str]:
    folder = _infiniband(scene)
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def check_nodes(scene: Scene) -> Iterator[Finding]:
    """Device nodes exist and the present user may open them."""
    folder = scene.dev / "infiniband"
    nodes = sorted(folder.glob("uverbs*"))
    wanted = scene.sys / "class/infiniband_verbs"
    if not nodes:
        if wanted.is_dir() and any(wanted.glob("uverbs*")):
            yield Finding(
                "device nodes",
                "problem",
                f"the kernel has devices, but there is no {folder}/uverbs*",
                "on a host: udevadm trigger; in a container, start it with: --device=/dev/infiniband/uverbs0",
            )
        return
    shut = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    for node in shut:
        info = node.stat()
        yield Finding(
            "device nodes",
            "problem",
            f"{node} may not be read and written by user {os.geteuid()} "
            f"(mode {info.st_mode & 0o777:o}, owner {info.st_uid}, group {info.st_gid})",
            "become a member of the group of the device node, or have a udev rule give it mode 0666",
        )
    if not shut:
        yield Finding(
            "device nodes", "ok", f"{', '.join(node.name for node in nodes)}: may be read and written"
        )


def check_devices(scene: Scene) -> Iterator[Finding]:
    """There is a device, it opens, and its transport is one that aiordma speaks."""
    if scene.source is None and scene.usroce is None:
        return
    if not scene.real and _kernel_devices(scene):
        yield Finding(
            "devices",
            "problem",
            scene.list_error or "the kernel has devices, but the verbs library finds none that it can drive",
            "see device nodes above; a driver library may be missing (Debian, Ubuntu: ibverbs-providers)",
        )
    elif not scene.reports:
        yield Finding("devices", "problem", scene.list_error or "there is no RDMA device", SOFT_ROCE)
    for report in scene.reports:
        name = f"device {report.name}"
        if report.attributes is None:
            fix = "the variables AIORDMA_USROCE_*" if report.usroce else "see device nodes above; then: dmesg"
            status: Status = "warning" if report.usroce and scene.real else "problem"
            yield Finding(name, status, f"cannot be opened: {report.error}", fix)
        elif report.transport == Transport.IWARP:
            yield Finding(
                name,
                "warning",
                "iWARP: its queue pairs are brought up by rdma_cm only, which aiordma does not use",
                "use a RoCE or InfiniBand device",
            )
        else:
            what = "the device in user space" if report.usroce else f"firmware {report.attributes.firmware}"
            yield Finding(name, "ok", f"{what}, {len(report.ports)} port(s)")


# --- ports and addresses ------------------------------------------------------------------------------


def check_ports(scene: Scene) -> Iterator[Finding]:
    """Every port is active; one that is not is a problem unless another one is."""
    active = [report for report in scene.opened if any(p.state == PortState.ACTIVE for p in report.ports)]
    some_active = any(not report.usroce for report in active)
    for report in scene.opened:
        for port in report.ports:
            name = f"port {report.name}/{port.port}"
            if port.state == PortState.ACTIVE:
                mtu = f"MTU {port.active_mtu} of {port.max_mtu}"
                yield Finding(name, "ok", f"ACTIVE, {port.link_layer.name.lower()}, {mtu}")
            else:
                reason, fix = _why_down(scene, report.name, port)
                status: Status = "warning" if some_active else "problem"
                yield Finding(name, status, f"{port.state.name}: {reason}", fix)


def _why_down(scene: Scene, device: str, port: PortAttributes) -> tuple[str, str]:
    if port.link_layer != LinkLayer.ETHERNET:
        if port.state == PortState.DOWN:
            return "no link", "check the cable and the switch port"
        return "no subnet manager has configured the port", "start opensm on one host of the fabric"
    interface = _interface_of(scene, device, port.port)
    if interface is None:
        return "its network interface is not known here", "set its network interface up: ip link set DEV up"
    folder = scene.sys / "class/net" / interface
    if not folder.is_dir():
        return f"its network interface {interface} is gone or in another network namespace", "ip link show"
    if not int(_read(folder / "flags") or "0", 16) & _IFF_UP:
        return f"network interface {interface} is set down", f"ip link set {interface} up"
    state = _read(folder / "operstate") or "unknown"
    if state not in ("up", "unknown"):
        return (
            f"network interface {interface} has no link (operstate {state})",
            "check the cable or the switch",
        )
    if not interface_addresses().get(interface):
        return (
            f"network interface {interface} has no address",
            f"ip address add ADDRESS/PREFIX dev {interface}",
        )
    return f"network interface {interface} is up", "dmesg may say why"


def _interface_of(scene: Scene, device: str, port: int) -> str | None:
    """The network interface of a RoCE port. Source: Documentation/ABI/stable/sysfs-class-infiniband."""
    folder = scene.sys / "class/infiniband" / device
    for index in range(16):
        name = _read(folder / f"ports/{port}/gid_attrs/ndevs/{index}")
        if name:
            return name
    return _read(folder / "parent")  # soft RoCE names it here


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None  # also what the kernel answers for an empty row of the GID table


def check_gids(scene: Scene) -> Iterator[Finding]:
    """Which GID each device would use for the address; a problem when none has any."""
    candidates = [report for report in scene.opened if report.transport != Transport.IWARP]
    if not candidates:
        return
    local, remote = _endpoints(scene.address)
    if scene.address is not None and local is None:
        yield Finding(
            "GID", "problem", f"no route to {scene.address}", "ip route get ADDRESS; ip address show"
        )
        return
    answers = [(report, *_gid_answer(report, local, remote)) for report in candidates]
    usable = any(ok for report, ok, _ in answers if not report.usroce) or not scene.real
    usable = usable and any(ok for _, ok, _ in answers)
    for report, ok, text in answers:
        status: Status = "ok" if ok else "warning" if usable else "problem"
        fix = None if ok else "give its network interface an address, or connect to one that it has"
        if not ok and report.usroce:
            fix = f"AIORDMA_USROCE_ADDRESS={local} or Config(usroce_address={str(local)!r})"
        whose = f" for {scene.address}" if scene.address else ""
        yield Finding(f"GID of {report.name}{whose}", status, text, fix)


def _gid_answer(report: DeviceReport, local: Address | None, remote: Address | None) -> tuple[bool, str]:
    try:
        choice = choose_gid(
            report.ports, report.gids, local=local, remote=remote, interfaces=interface_addresses()
        )
    except DeviceError as error:
        return False, str(error)
    return True, choice.explain()


def _endpoints(address: Address | None) -> tuple[Address | None, Address | None]:
    """(local, remote) of a connection from ``address`` if it is ours, else to it."""
    if address is None:
        return None, None
    if any(address in addresses for addresses in interface_addresses().values()):
        return address, None
    try:
        family, _, _, _, target = socket.getaddrinfo(str(address), 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(target)  # sends nothing: only asks for the route
            return ipaddress.ip_address(sock.getsockname()[0]), address
    except OSError:
        return None, address


# --- memory -------------------------------------------------------------------------------------------


def check_memlock(scene: Scene) -> Iterator[Finding]:
    """Registered memory is pinned, and pinned memory is limited."""
    if scene.reports and not scene.real:
        yield Finding("locked memory", "ok", "of no matter: usroce pins no memory")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield judge_memlock(soft, hard, privileged=_may_lock(scene), config=Config())


def judge_memlock(soft: int, hard: int, *, privileged: bool, config: Config) -> Finding:
    """``soft`` and ``hard`` in bytes, or RLIM_INFINITY."""
    name = "locked memory"
    found = f"RLIMIT_MEMLOCK soft {_limit(soft)}, hard {_limit(hard)}"
    if privileged:
        return Finding(name, "ok", f"{found}; does not bind this process, which has CAP_IPC_LOCK")
    if soft == _UNLIMITED or soft >= config.pool_limit:
        return Finding(name, "ok", found)
    fix = (
        "ulimit -l unlimited (shell); LimitMEMLOCK=infinity (systemd); memlock in /etc/security/limits.conf; "
        "--ulimit memlock=-1 (container)"
    )
    if soft < config.slab_size:
        found += f": less than one slab of the pool, {size(config.slab_size)}"
        return Finding(name, "problem", found, fix)
    found += f": the pool may grow to {size(config.pool_limit)}, registrations beyond the limit will fail"
    return Finding(name, "warning", found, fix)


def _limit(value: int) -> str:
    return "unlimited" if value == _UNLIMITED else size(value)


def _may_lock(scene: Scene) -> bool:
    return _capable(scene, _CAP_IPC_LOCK)


def _capable(scene: Scene, capability: int) -> bool:
    """Has it, in the first user namespace: the kernel asks for these there (user_namespaces(7))."""
    if (_read(scene.proc / "self/uid_map") or "").split() != ["0", "0", "4294967295"]:
        return False
    text = _read(scene.proc / "self/status") or ""
    for line in text.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def check_huge_pages(scene: Scene) -> Iterator[Finding]:
    """Free huge pages spare the device's address translation; none is no fault."""
    pools = sorted((scene.sys / "kernel/mm/hugepages").glob("hugepages-*kB"))
    found = []
    for pool in pools:
        nbytes = int(pool.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        found.append((int(_read(pool / "free_hugepages") or "0"), nbytes))
    text = ", ".join(f"{free} free of {size(nbytes)}" for free, nbytes in sorted(found, key=lambda f: f[1]))
    if any(free for free, _ in found):
        yield Finding("huge pages", "ok", text)
    else:
        yield Finding(
            "huge pages",
            "ok",
            f"{text or 'not supported by this kernel'}; slabs use ordinary pages (not an error)",
            "for faster large transfers, as root: sysctl vm.nr_hugepages=128" if found else None,
        )


# --- this process -------------------------------------------------------------------------------------


def check_fork(scene: Scene) -> Iterator[Finding]:
    """Whether a fork() while memory is registered is safe for the parent."""
    if not scene.real and scene.reports:
        yield Finding("fork safety", "ok", "safe: usroce pins no memory, and is closed to a forked child")
    if scene.source is None or not scene.real:
        return  # without a device the library answers "disabled", which means nothing then
    status = scene.source.fork_status()
    meaning = {
        "unneeded": "safe: the kernel copies pinned pages for the child",
        "enabled": "safe: the library keeps registered pages out of the child",
        "disabled": "a fork() (subprocess, multiprocessing) may detach registered memory from the device",
        "unknown": "the verbs library is too old to say (rdma-core before v35)",
    }[status]
    risky = status in ("disabled", "unknown")
    fix = "set RDMAV_FORK_SAFE=1 in the environment, or use Linux 5.12 or newer" if risky else None
    yield Finding("fork safety", "warning" if risky else "ok", f"{status}: {meaning}", fix)


def check_open_files(scene: Scene) -> Iterator[Finding]:
    """Each connection has a TCP socket, and so a file descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield judge_open_files(soft, hard, config=Config())


def judge_open_files(soft: int, hard: int, *, config: Config) -> Finding:
    """``soft`` and ``hard`` in descriptors, or RLIM_INFINITY."""
    name = "open files"
    found = f"RLIMIT_NOFILE soft {_count(soft)}, hard {_count(hard)}"
    if soft == _UNLIMITED or soft > config.max_connections:
        return Finding(name, "ok", found)
    return Finding(
        name,
        "ok",
        f"{found}: a server has room for fewer than {config.max_connections} connections (not an error)",
        "for more: ulimit -n (shell); LimitNOFILE= (systemd); --ulimit nofile= (container)",
    )


def _count(value: int) -> str:
    return "unlimited" if value == _UNLIMITED else str(value)


def check_limits(scene: Scene) -> Iterator[Finding]:
    """The limits of each device against what the default settings ask for."""
    for report in scene.opened:
        yield from _judge_limits(report, Config())


def _judge_limits(report: DeviceReport, config: Config) -> Iterator[Finding]:
    a = report.attributes
    assert a is not None
    name = f"limits of {report.name}"
    depth = max(config.send_depth, config.receive_credits)
    both = config.send_depth + config.receive_credits
    few = []
    if a.max_qp_wr < depth:
        few.append(f"max_qp_wr {a.max_qp_wr}, and the default settings need {depth}")
    if a.max_cqe < both:
        few.append(f"max_cqe {a.max_cqe}, and one connection of the default settings needs {both}")
    if few:
        yield Finding(name, "problem", "; ".join(few), "lower Config(send_depth=..., receive_credits=...)")
        return
    less = []
    if min(a.max_read_depth, a.max_read_depth_initiator) < config.read_depth:
        less.append(f"fewer reads in flight than Config(read_depth={config.read_depth}) asks for")
    if not a.atomics:
        less.append("no atomics")
    if not a.max_srq:
        less.append("no shared receive queues: each connection of a server has receives of its own")
    if not a.memory_windows:
        less.append("no type-2 memory windows: access is granted by registering memory anew, which is slower")
    found = f"max_qp_wr {a.max_qp_wr}, max_cqe {a.max_cqe}"
    yield Finding(name, "warning" if less else "ok", "; ".join([found, *less]))


def check_uvloop(scene: Scene) -> Iterator[Finding]:
    """uvloop is used when present, never required."""
    if importlib.util.find_spec("uvloop") is not None:
        yield Finding("uvloop", "ok", "installed")
    else:
        yield Finding(
            "uvloop", "ok", "not installed (not required)", "for a faster event loop: pip install uvloop"
        )


CHECKS: Sequence[Check] = (
    check_library,
    check_usroce,
    check_kernel,
    check_nodes,
    check_devices,
    check_ports,
    check_gids,
    check_memlock,
    check_huge_pages,
    check_fork,
    check_open_files,
    check_limits,
    check_uvloop,
)
