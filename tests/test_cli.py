"""The command line without a device: what it prints, its exit status, and that nothing makes it break."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import resource
from pathlib import Path
from typing import Any, cast

import pytest

from aiordma.cli import COMMANDS, doctor, main, output
from aiordma.cli.devices import DeviceReport
from aiordma.cli.doctor import Finding, Scene
from aiordma.config import Config
from aiordma.verbs import (
    DeviceAttributes,
    GidEntry,
    GidType,
    LinkLayer,
    PortAttributes,
    PortState,
    Provider,
    Transport,
)

MISSING = "/nowhere/libibverbs.so.1"

ATTRIBUTES = DeviceAttributes(
    firmware="1.2.3",
    vendor_id=0x2C9,
    vendor_part_id=0x1017,
    node_guid="0001:0203:0405:0607",
    ports=1,
    max_qp=1024,
    max_qp_wr=16384,
    max_sge=30,
    max_cq=1024,
    max_cqe=65536,
    max_mr=1024,
    max_mr_size=1 << 40,
    max_pd=64,
    max_mw=64,
    max_srq=64,
    max_srq_wr=16384,
    max_read_depth=16,
    max_read_depth_initiator=16,
    atomics=True,
    memory_windows=True,
)
PORT = PortAttributes(1, PortState.ACTIVE, LinkLayer.ETHERNET, 0, 1024, 4096, 1 << 30, 16)
GID = GidEntry(1, 0, ipaddress.IPv6Address("::ffff:10.0.0.1"), GidType.ROCE_V2, "eth9")
REPORT = DeviceReport("dev0", Transport.IB, None, ATTRIBUTES, (PORT,), (GID,))
DOWN = dataclasses.replace(REPORT, ports=(dataclasses.replace(PORT, state=PortState.DOWN),))


def scene(root: Path, *reports: DeviceReport, **changes: Any) -> Scene:
    """A machine whose /sys, /dev and /proc are empty folders below ``root`` until a test fills them."""
    return Scene(None, None, reports, None, sys=root / "sys", dev=root / "dev", proc=root / "proc", **changes)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def only(check: doctor.Check, machine: Scene) -> Finding:
    (finding,) = check(machine)
    return finding


class TestMain:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith("aiordma ")

    def test_help_lists_every_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        text = capsys.readouterr().out
        assert all(name in text for name in COMMANDS)

    @pytest.mark.parametrize("line", [[], ["nonsense"], ["doctor", "--address", "not-an-address"]])
    def test_a_wrong_command_line(self, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(line)
        assert caught.value.code == 2
        assert "usage: aiordma" in capsys.readouterr().err


class TestMissingLibrary:
    def test_devices(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["devices", "--library", MISSING]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert MISSING in err
        assert "aiordma doctor" in err

    def test_devices_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["devices", "--json", "--library", MISSING]) == 1
        answer = json.loads(capsys.readouterr().out)
        assert answer["devices"] == []
        assert MISSING in answer["error"]

    def test_doctor(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--library", MISSING]) == 1
        text = capsys.readouterr().out
        assert f"PROBLEM  verbs library: the verbs library {MISSING} cannot be used" in text
        assert "fix: Debian, Ubuntu: apt install libibverbs1" in text

    def test_doctor_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--json", "--library", MISSING]) == 1
        answer = json.loads(capsys.readouterr().out)
        assert answer["ok"] is False
        assert all(set(f) == {"name", "status", "found", "fix"} for f in answer["findings"])
        assert {f["status"] for f in answer["findings"]} <= {"ok", "warning", "problem"}
        (library,) = (f for f in answer["findings"] if f["name"] == "verbs library")
        assert library["status"] == "problem"
        assert library["fix"]


def test_doctor_here_gives_an_answer_whatever_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert status == (0 if answer["ok"] else 1)
    assert not any("the check itself failed" in f["found"] for f in answer["findings"])


class TestNoDevice:
    def test_how_to_get_one(self, tmp_path: Path) -> None:
        machine = dataclasses.replace(scene(tmp_path), source=cast(Provider, object()))
        finding = only(doctor.check_devices, machine)
        assert finding.status == "problem"
        assert finding.fix is not None
        for words in ("modprobe rdma_rxe", "rdma link add rxe0 type rxe netdev eth0", "tools.rxe run"):
            assert words in finding.fix

    def test_a_kernel_without_rdma(self, tmp_path: Path) -> None:
        assert "does not exist" in only(doctor.check_kernel, scene(tmp_path)).found

    def test_a_library_with_devices_of_its_own_needs_no_kernel(self, tmp_path: Path) -> None:
        assert only(doctor.check_kernel, scene(tmp_path, REPORT)).status == "ok"
        assert list(doctor.check_nodes(scene(tmp_path, REPORT))) == []


USROCE_GID = GidEntry(1, 0, ipaddress.IPv6Address("::ffff:127.0.0.1"), GidType.ROCE_V2, "lo")
USROCE_PORT = dataclasses.replace(PORT, lid=4791)
USROCE = DeviceReport("usroce0", Transport.IB, None, ATTRIBUTES, (USROCE_PORT,), (USROCE_GID,), usroce=True)
LIBRARY = cast(Provider, object())


class TestUsroce:
    def findings(self, machine: Scene) -> dict[str, Finding]:
        return {finding.name: finding for finding in doctor.diagnose(machine)}

    def test_a_machine_without_anything_else_is_well(self, tmp_path: Path) -> None:
        machine = scene(tmp_path, USROCE, usroce=LIBRARY)
        machine = dataclasses.replace(machine, library_error="libibverbs.so.1 cannot be used; install it")
        found = self.findings(machine)
        assert {finding.status for finding in found.values()} == {"ok"}
        assert "usroce needs none" in found["verbs library"].found
        assert "apt install libibverbs1" in (found["verbs library"].fix or "")
        assert "usroce is used" in found["kernel devices"].found
        assert "pins no memory" in found["locked memory"].found
        assert "forked child" in found["fork safety"].found

    def test_it_excuses_no_fault_of_real_devices(self, tmp_path: Path) -> None:
        found = self.findings(scene(tmp_path, DOWN, USROCE, usroce=LIBRARY))
        assert found["port dev0/1"].status == "problem"
        assert found["port usroce0/1"].status == "ok"
        assert found["GID of dev0"].status == "problem"
        (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
        found = self.findings(scene(tmp_path, USROCE, usroce=LIBRARY))
        assert found["verbs library"].status == "problem"
        assert found["devices"].status == "problem"

    def test_a_library_that_does_not_open(self, tmp_path: Path) -> None:
        machine = scene(tmp_path, usroce_error="libusroce.so cannot be used: no such file; install it anew")
        finding = only(doctor.check_usroce, machine)
        assert (finding.status, finding.fix) == ("problem", "install it anew")
        machine = dataclasses.replace(machine, reports=(REPORT,))
        assert only(doctor.check_usroce, machine).status == "warning"

    def test_switched_off(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AIORDMA_USROCE", "0")
        assert "AIORDMA_USROCE=0" in only(doctor.check_usroce, scene(tmp_path)).found

    @pytest.mark.parametrize(
        ("address", "private"), [("::ffff:127.0.0.1", True), ("::1", True), ("::ffff:10.0.0.1", False)]
    )
    def test_who_reaches_it(self, tmp_path: Path, address: str, private: bool) -> None:
        gid = dataclasses.replace(USROCE_GID, gid=ipaddress.IPv6Address(address))
        report = dataclasses.replace(USROCE, gids=(gid,))
        finding = self.findings(scene(tmp_path, report))["addresses of usroce0"]
        assert str(gid.address) in finding.found
        assert ("only this machine" in finding.found) is private
        assert ("AIORDMA_USROCE_ADDRESS" in (finding.fix or "")) is private

    def test_the_port_is_taken(self, tmp_path: Path) -> None:
        port = dataclasses.replace(USROCE_PORT, lid=50_000)
        machine = scene(tmp_path, dataclasses.replace(USROCE, ports=(port,)))
        assert "by another process" in self.findings(machine)["UDP port 4791"].found
        write(tmp_path / "sys/class/infiniband/rxe0/parent", "eth0")
        finding = self.findings(machine)["UDP port 4791"]
        assert "by the kernel's soft RoCE (rxe0)" in finding.found
        assert "does not reach it" in (finding.fix or "")
        assert "free" in self.findings(scene(tmp_path, USROCE))["UDP port 4791"].found

    @pytest.mark.parametrize(("limit", "hint"), [(212_992, True), (16 << 20, False)])
    def test_socket_buffers(self, tmp_path: Path, limit: int, hint: bool) -> None:
        for name in ("rmem_max", "wmem_max"):
            write(tmp_path / f"proc/sys/net/core/{name}", str(limit))
        finding = self.findings(scene(tmp_path, USROCE))["socket buffers"]
        assert finding.status == "ok"
        assert ("net.core.rmem_max=8388608" in (finding.fix or "")) is hint

    def test_an_address_that_it_does_not_have(self, tmp_path: Path) -> None:
        machine = scene(tmp_path, USROCE, address=ipaddress.ip_address("192.0.2.1"))
        finding = only(doctor.check_gids, machine)
        assert finding.status == "problem"
        assert "AIORDMA_USROCE_ADDRESS=" in (finding.fix or "no route") or "no route" in finding.found


class TestNodes:
    def test_missing_in_a_container(self, tmp_path: Path) -> None:
        (tmp_path / "sys/class/infiniband_verbs/uverbs0").mkdir(parents=True)
        finding = only(doctor.check_nodes, scene(tmp_path))
        assert finding.status == "problem"
        assert "--device=/dev/infiniband/uverbs0" in (finding.fix or "")

    @pytest.mark.parametrize(("allowed", "status"), [(True, "ok"), (False, "problem")])
    def test_permission(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, status: str
    ) -> None:
        write(tmp_path / "dev/infiniband/uverbs0", "")
        monkeypatch.setattr("os.access", lambda path, mode: allowed)
        finding = only(doctor.check_nodes, scene(tmp_path))
        assert finding.status == status
        assert "uverbs0" in finding.found

    def test_uverbs_not_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
        findings = list(doctor.check_kernel(scene(tmp_path)))
        assert [(f.status, f.fix) for f in findings] == [("ok", None), ("problem", "modprobe ib_uverbs")]


class TestPorts:
    @pytest.fixture
    def machine(self, tmp_path: Path) -> Scene:
        """A port that is down, on an interface that is up and has a link but no address."""
        write(tmp_path / "sys/class/infiniband/dev0/ports/1/gid_attrs/ndevs/0", "eth9")
        write(tmp_path / "sys/class/net/eth9/flags", "0x1003")
        write(tmp_path / "sys/class/net/eth9/operstate", "up")
        return scene(tmp_path, DOWN)

    def test_no_address(self, machine: Scene) -> None:
        finding = only(doctor.check_ports, machine)
        assert finding.status == "problem"
        assert "eth9 has no address" in finding.found

    def test_set_down(self, machine: Scene) -> None:
        write(machine.sys / "class/net/eth9/flags", "0x1002")
        assert only(doctor.check_ports, machine).fix == "ip link set eth9 up"

    def test_no_link(self, machine: Scene) -> None:
        write(machine.sys / "class/net/eth9/operstate", "down")
        assert "no link" in only(doctor.check_ports, machine).found

    def test_interface_of_another_namespace(self, tmp_path: Path) -> None:
        write(tmp_path / "sys/class/infiniband/dev0/parent", "eth7")
        assert "eth7 is gone or in another" in only(doctor.check_ports, scene(tmp_path, DOWN)).found

    def test_unknown_interface(self, tmp_path: Path) -> None:
        assert "not known" in only(doctor.check_ports, scene(tmp_path, DOWN)).found

    def test_infiniband_without_a_subnet_manager(self, tmp_path: Path) -> None:
        port = dataclasses.replace(PORT, state=PortState.INIT, link_layer=LinkLayer.INFINIBAND)
        finding = only(doctor.check_ports, scene(tmp_path, dataclasses.replace(REPORT, ports=(port,))))
        assert "opensm" in (finding.fix or "")

    def test_one_active_port_is_enough(self, machine: Scene) -> None:
        findings = list(doctor.check_ports(dataclasses.replace(machine, reports=(REPORT, DOWN))))
        assert [f.status for f in findings] == ["ok", "warning"]


class TestGids:
    def test_explains_the_choice(self, tmp_path: Path) -> None:
        finding = only(doctor.check_gids, scene(tmp_path, REPORT))
        assert finding.status == "ok"
        assert "chosen" in finding.found

    def test_none_for_the_address(self, tmp_path: Path) -> None:
        finding = only(doctor.check_gids, scene(tmp_path, DOWN, address=ipaddress.ip_address("127.0.0.1")))
        assert finding.status == "problem"
        assert "port 1 is DOWN" in finding.found
        assert finding.fix

    def test_iwarp_is_left_out(self, tmp_path: Path) -> None:
        iwarp = dataclasses.replace(REPORT, transport=Transport.IWARP)
        assert list(doctor.check_gids(scene(tmp_path, iwarp))) == []


MIB = 1 << 20
UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "privileged", "status"),
    [
        (UNLIMITED, False, "ok"),
        (256 * MIB, False, "ok"),
        (8 * MIB, False, "warning"),
        (64 * 1024, False, "problem"),
        (64 * 1024, True, "ok"),
    ],
)
def test_memlock(soft: int, privileged: bool, status: str) -> None:
    finding = doctor.judge_memlock(soft, UNLIMITED, privileged=privileged, config=Config())
    assert finding.status == status
    assert (finding.fix is None) == (status == "ok")


def test_open_files() -> None:
    assert doctor.judge_open_files(20_000, 20_000, config=Config()).fix is None
    assert doctor.judge_open_files(UNLIMITED, UNLIMITED, config=Config()).fix is None
    few = doctor.judge_open_files(1024, 4096, config=Config())
    assert (few.status, few.found.split(":")[0]) == ("ok", "RLIMIT_NOFILE soft 1024, hard 4096")
    assert few.fix is not None
    assert "ulimit -n" in few.fix


@pytest.mark.parametrize(
    ("uid_map", "capabilities", "expected"),
    [
        ("0 0 4294967295", "000001ffffffffff", True),
        ("0 0 4294967295", "0000000000000000", False),
        ("0 1000 1", "000001ffffffffff", False),  # root of a rootless container
    ],
)
def test_capability(tmp_path: Path, uid_map: str, capabilities: str, expected: bool) -> None:
    write(tmp_path / "proc/self/uid_map", uid_map)
    write(tmp_path / "proc/self/status", f"Name:\tx\nCapEff:\t{capabilities}")
    assert ("CAP_IPC_LOCK" in only(doctor.check_memlock, scene(tmp_path)).found) is expected


def test_huge_pages(tmp_path: Path) -> None:
    machine = scene(tmp_path)
    assert "not supported" in only(doctor.check_huge_pages, machine).found
    write(machine.sys / "kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0")
    assert "vm.nr_hugepages" in (only(doctor.check_huge_pages, machine).fix or "")
    write(machine.sys / "kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "3")
    assert only(doctor.check_huge_pages, machine).found == "0 free of 2 MiB, 3 free of 1 GiB"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, "ok", "max_qp_wr 16384"),
        ({"max_qp_wr": 32}, "problem", "max_qp_wr 32"),
        ({"max_cqe": 100}, "problem", "max_cqe 100"),
        ({"max_read_depth": 1}, "warning", "reads in flight"),
        ({"atomics": False}, "warning", "no atomics"),
        ({"memory_windows": False}, "warning", "memory windows"),
    ],
)
def test_limits(tmp_path: Path, change: dict[str, Any], status: str, words: str) -> None:
    report = dataclasses.replace(REPORT, attributes=dataclasses.replace(ATTRIBUTES, **change))
    finding = only(doctor.check_limits, scene(tmp_path, report))
    assert finding.status == status
    assert words in finding.found


def test_a_check_that_breaks_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_the_moon(machine: Scene) -> Any:
        yield Finding("moon", "ok", "there")
        raise RuntimeError("eclipse")

    monkeypatch.setattr(doctor, "CHECKS", (check_the_moon,))
    findings = doctor.diagnose(scene(tmp_path))
    assert [f.status for f in findings] == ["ok", "problem"]
    assert "eclipse" in findings[1].found


class TestOutput:
    def test_table_aligns_and_leaves_no_trailing_space(self) -> None:
        assert output.table(("a", "long"), [(1, "x"), (22, "yy")], "  ") == "  a   long\n  1   x\n  22  yy"

    @pytest.mark.parametrize(
        ("nbytes", "text"), [(0, "0 bytes"), (1000, "1000 bytes"), (2048, "2 KiB"), (1 << 30, "1 GiB")]
    )
    def test_size(self, nbytes: int, text: str) -> None:
        assert output.size(nbytes) == text

    def test_plain(self) -> None:
        assert output.plain({"port": PORT, "gid": (GID.gid,)}) == {
            "port": {
                "port": 1,
                "state": "ACTIVE",
                "link_layer": "ETHERNET",
                "lid": 0,
                "active_mtu": 1024,
                "max_mtu": 4096,
                "max_message": 1 << 30,
                "gid_table_length": 16,
            },
            "gid": ["::ffff:a00:1"],
        }
