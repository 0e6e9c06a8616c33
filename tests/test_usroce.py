"""usroce as Python sees it, without the device: faults, libraries, the choice of a device, `usroce run`."""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from aiordma import Config, adapter
from aiordma.cli import main
from aiordma.cli import usroce as command
from aiordma.errors import DeviceError, LibraryError, MisuseError, RdmaError
from aiordma.verbs import Device, GidEntry, GidType, LinkLayer, PortAttributes, PortState, Transport, device
from aiordma.verbs.usroce import Fault

#: The module; the package has the function of that name.
seam: Any = importlib.import_module("aiordma.verbs.provider")

LOOPBACK = ipaddress.ip_address("127.0.0.1")


class TestFault:
    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("", Fault()),
            ("drop=0.01,seed=1", Fault(drop=0.01, seed=1)),
            ("drop=1", Fault(drop=1.0)),
            (
                " delay=0.5, delay_us=200 ,reorder=1e-3,reorder_gap=8",
                Fault(delay=0.5, delay_us=200, reorder=0.001, reorder_gap=8),
            ),
            ("duplicate=0.1,corrupt=0.2", Fault(duplicate=0.1, corrupt=0.2)),
        ],
    )
    def test_text_and_back(self, text: str, fault: Fault) -> None:
        assert Fault.parse(text) == fault
        assert Fault.parse(str(fault)) == fault

    @pytest.mark.parametrize(
        "text",
        ["drop", "drop=", "drop=1.1", "drop=-0.1", "drop=nan", "loss=1", "seed=1.5", "seed=-1", "delay=0.5"],
    )
    def test_wrong_text(self, text: str) -> None:
        with pytest.raises(MisuseError):
            Fault.parse(text)

    @pytest.mark.parametrize(
        "values",
        [{"drop": True}, {"drop": "0.1"}, {"delay_us": 1 << 32}, {"seed": 1 << 64}, {"reorder_gap": 1.0}],
    )
    def test_wrong_values(self, values: dict[str, Any]) -> None:
        with pytest.raises(MisuseError, match=next(iter(values))):
            Fault(**values)


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.1,2001:db8::1", " ::1 , 127.0.0.1"])
def test_config_takes_addresses(address: str) -> None:
    assert Config(usroce_address=address).usroce_address == address


@pytest.mark.parametrize("address", ["", "eth0", "0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0", "1.2.3.4,", 4])
def test_config_refuses_what_is_no_address(address: Any) -> None:
    with pytest.raises(MisuseError, match="usroce_address"):
        Config(usroce_address=address)


def test_whether_memory_is_shared_is_yes_no_or_the_environments() -> None:
    assert [Config(usroce_shared_memory=value).usroce_shared_memory for value in (None, True, False)] == [
        None,
        True,
        False,
    ]
    with pytest.raises(MisuseError, match="usroce_shared_memory"):
        Config(usroce_shared_memory="0")  # type: ignore[arg-type]


# --- the libraries ------------------------------------------------------------------------------------


class FakeProvider:
    """A library that opens, with devices of its own."""

    def __init__(self, path: str, *names: str, handle: int = 0) -> None:
        self.path = path
        self.names = names
        self.handle = handle or hash(path)
        self.is_usroce = "usroce" in path


class Libraries:
    """What can be opened on a machine; installed in place of the real seam."""

    def __init__(self, *available: FakeProvider) -> None:
        self.available = {each.path: each for each in available}

    def provider(self, path: str = seam.DEFAULT_LIBRARY) -> Any:
        if path not in self.available:
            raise LibraryError(f"{path} is missing", errno=2, call="dlopen")
        return self.available[path]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("AIORDMA_USROCE", "AIORDMA_DEVICE", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)

    def install(*available: FakeProvider) -> None:
        monkeypatch.setattr(seam, "provider", Libraries(*available).provider)

        def devices_of(source: Any) -> list[Any]:
            if "broken" in source.names:
                raise DeviceError(f"{source.path} is broken")
            return [f"{name} of {source.path}" for name in source.names]

        monkeypatch.setattr(device, "_devices_of", devices_of)

    return install


IBVERBS = seam.DEFAULT_LIBRARY
USROCE = seam.USROCE_LIBRARY


class TestLibraries:
    def test_usroce_lies_beside_the_compiled_modules(self) -> None:
        assert Path(USROCE).name == "libusroce.so"
        assert list(Path(USROCE).parent.glob("_verbs.*.so"))

    def test_real_devices_come_first(self, install: Any) -> None:
        install(FakeProvider(USROCE, "usroce0"), FakeProvider(IBVERBS, "mlx5_0"))
        assert device.devices() == [f"mlx5_0 of {IBVERBS}", f"usroce0 of {USROCE}"]  # type: ignore[comparison-overlap]

    def test_each_may_be_missing(self, install: Any) -> None:
        install(FakeProvider(USROCE, "usroce0"))
        assert [each.path for each in seam.providers()] == [USROCE]
        install(FakeProvider(IBVERBS))
        assert [each.path for each in seam.providers()] == [IBVERBS]
        assert device.devices() == []

    def test_neither_is_an_error_that_names_both(self, install: Any) -> None:
        install()
        with pytest.raises(LibraryError, match=r"libibverbs.so.1 is missing(.|\n)*libusroce.so is missing"):
            device.devices()

    def test_switched_off(self, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        install(FakeProvider(USROCE, "usroce0"), FakeProvider(IBVERBS, "mlx5_0"))
        monkeypatch.setenv("AIORDMA_USROCE", "0")
        assert [each.path for each in seam.providers()] == [IBVERBS]

    def test_under_usroce_run_it_is_the_only_one(self, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        install(FakeProvider(USROCE, "usroce0"), FakeProvider(IBVERBS, "mlx5_0"))
        monkeypatch.setenv("LD_PRELOAD", f"/usr/lib/libasan.so.8 {USROCE}")
        assert [each.path for each in seam.providers()] == [USROCE]

    def test_one_library_under_two_names(self, install: Any) -> None:
        """libusroce.so may stand in the place of libibverbs.so.1."""
        install(FakeProvider(USROCE, "usroce0", handle=7), FakeProvider(IBVERBS, "usroce0", handle=7))
        assert len(device.devices()) == 1

    def test_one_that_cannot_list_does_not_hide_the_other(self, install: Any) -> None:
        install(FakeProvider(USROCE, "usroce0"), FakeProvider(IBVERBS, "broken"))
        assert len(device.devices()) == 1
        install(FakeProvider(USROCE), FakeProvider(IBVERBS, "broken"))
        with pytest.raises(DeviceError, match="broken"):
            device.devices()


# --- the choice of a device ---------------------------------------------------------------------------


class FakeContext:
    def __init__(self, name: str, addresses: str) -> None:
        self.name = name
        self.table = [
            GidEntry(1, i, ipaddress.IPv6Address(f"::ffff:{a}" if "." in a else a), GidType.ROCE_V2, "lo")
            for i, a in enumerate(addresses.split())
        ]

    def ports(self) -> list[PortAttributes]:
        return [PortAttributes(1, PortState.ACTIVE, LinkLayer.ETHERNET, 4791, 1024, 4096, 1 << 30, 16)]

    def gids(self) -> list[GidEntry]:
        return self.table


class FakeDevice:
    transport = Transport.IB

    def __init__(self, name: str, addresses: str) -> None:
        self.name = name
        self.addresses = addresses
        self.is_usroce = name.startswith("usroce")


class FakeAdapter:
    def __init__(self, made: FakeDevice) -> None:
        self.context = FakeContext(made.name, made.addresses)
        self.released = 0

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives this machine these devices, as ``name="address ..."``, and eth0 with 10.0.0.1."""
    monkeypatch.delenv("AIORDMA_DEVICE", raising=False)

    def machine(**table: str) -> None:
        made = [FakeDevice(name, addresses) for name, addresses in table.items()]
        monkeypatch.setattr(adapter, "devices", lambda: made)
        monkeypatch.setattr(adapter, "acquire_adapter", lambda one, config: FakeAdapter(one))
        interfaces = {"lo": [LOOPBACK], "eth0": [ipaddress.ip_address("10.0.0.1")]}
        monkeypatch.setattr(adapter, "interface_addresses", lambda: interfaces)

    return machine


def route(local: str | None, remote: str | None, name: str | None = None) -> tuple[str, str]:
    here, there = (ipaddress.ip_address(end) if end else None for end in (local, remote))
    found = adapter.open_route(name, here, there, Config())
    assert found.choice.entry is not None
    return found.adapter.context.name, str(found.choice.entry.address)


class TestRoute:
    @pytest.mark.parametrize(
        ("local", "remote", "address"),
        [
            ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
            ("::1", "::1", "::1"),
            (None, None, "127.0.0.1"),
            ("10.0.0.1", "10.0.0.1", "127.0.0.1"),
        ],
    )
    def test_loopback(self, machine: Any, local: str, remote: str, address: str) -> None:
        machine(usroce0="127.0.0.1 ::1")
        assert route(local, remote) == ("usroce0", address)

    def test_a_real_device_is_preferred(self, machine: Any) -> None:
        machine(mlx5_0="10.0.0.1", usroce0="127.0.0.1 ::1")
        assert route("10.0.0.1", "10.0.0.9")[0] == "mlx5_0"
        assert route("127.0.0.1", "127.0.0.1")[0] == "mlx5_0"
        assert route("127.0.0.1", "127.0.0.1", "usroce0")[0] == "usroce0"

    def test_usroce_where_the_real_one_does_not_reach_the_peer(self, machine: Any) -> None:
        machine(mlx5_0="192.168.5.5", usroce0="10.0.0.1")
        assert route("10.0.0.1", "10.0.0.9")[0] == "usroce0"

    def test_another_machine_needs_an_address(self, machine: Any) -> None:
        machine(usroce0="127.0.0.1 ::1")
        with pytest.raises(DeviceError, match=r"AIORDMA_USROCE_ADDRESS=10\.0\.0\.1") as caught:
            route("10.0.0.1", "10.0.0.9")
        assert "Config(usroce_address='10.0.0.1')" in str(caught.value)

    def test_no_device_names_the_switch(self, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        machine()
        monkeypatch.setenv("AIORDMA_USROCE", "0")
        with pytest.raises(DeviceError, match="AIORDMA_USROCE=0"):
            route(None, None)


async def test_other_addresses_make_another_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two configurations of one loop never share a device that has the addresses of one of them."""
    opened: list[str | None] = []
    now: list[str | None] = [None]

    class Opening(FakeDevice):
        def open(self) -> None:
            opened.append(now[0])

    class Made:
        def __init__(self, context: object, config: Config, key: object) -> None:
            self.key = key

        def use(self) -> Made:
            return self

    class Options:
        def __init__(self, address: str) -> None:
            now[0] = address

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            now[0] = None

    monkeypatch.setattr(adapter, "Adapter", Made)
    monkeypatch.setattr("aiordma.verbs.usroce.options", Options)
    one: Any = Opening("usroce0", "")
    plain, first, same, second = (
        adapter.acquire_adapter(one, Config(usroce_address=address))
        for address in (None, "192.0.2.1,::1", " 192.0.2.1, 0:0:0:0:0:0:0:1", "192.0.2.2")
    )
    assert first is same
    assert len({id(each) for each in (plain, first, second)}) == 3
    assert opened == [None, "192.0.2.1,::1", "192.0.2.2"]
    real: Any = Opening("mlx5_0", "")
    assert adapter.acquire_adapter(real, Config(usroce_address="192.0.2.1")) is adapter.acquire_adapter(
        real, Config()
    )
    adapter._adapters.pop(asyncio.get_running_loop())


# --- aiordma usroce run -------------------------------------------------------------------------------


class TestPreload:
    def test_before_others_and_once(self) -> None:
        assert command.preload("/p/libusroce.so", "") == "/p/libusroce.so"
        assert (
            command.preload("/p/libusroce.so", "/a.so:/b.so /p/libusroce.so") == "/p/libusroce.so /a.so /b.so"
        )

    def test_behind_a_sanitizer(self) -> None:
        present = "/usr/lib/libasan.so.8 /a.so"
        assert command.preload("/p/libusroce.so", present) == "/usr/lib/libasan.so.8 /p/libusroce.so /a.so"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without libibverbs, whose libusroce.so is a file anywhere."""
    library = tmp_path / "libusroce.so"
    library.touch()
    monkeypatch.setattr(seam, "USROCE_LIBRARY", str(library))
    monkeypatch.setattr(seam, "provider", lambda path=IBVERBS: FakeProvider(path))
    monkeypatch.setattr(command, "libibverbs_is_installed", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return library


class TestEnvironment:
    def test_a_link_stands_in_for_libibverbs(self, library: Path) -> None:
        made = command.program_environment({"FAULT": "drop=0.5"}, {"LD_LIBRARY_PATH": "/x", "HOME": "/h"})
        assert made["LD_PRELOAD"] == str(library)
        assert made["AIORDMA_USROCE_FAULT"] == "drop=0.5"
        assert made["HOME"] == "/h"
        folder, other = made["LD_LIBRARY_PATH"].split(":")
        assert other == "/x"
        link = Path(folder, "libibverbs.so.1")
        assert link.resolve() == library.resolve()
        assert command.program_environment()["LD_LIBRARY_PATH"].split(":")[0] == folder, "the same each time"
        assert os.listdir(folder) == ["libibverbs.so.1"]

    def test_the_link_follows_the_library(self, library: Path, tmp_path: Path) -> None:
        command.stand_in(str(tmp_path / "elsewhere.so"), "libibverbs.so.1")
        link = command.stand_in(str(library), "libibverbs.so.1")
        assert os.readlink(link) == str(library)

    def test_where_the_cache_cannot_be_written(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cache").touch()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        link = Path(command.stand_in(str(library), "libibverbs.so.1"))
        assert link.parent.parent.parent == tmp_path / "tmp"
        assert stat.S_IMODE(link.parent.stat().st_mode) == 0o700

    def test_a_folder_that_others_may_write_is_not_used(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for parent in (tmp_path / "cache/aiordma", tmp_path / f"tmp/aiordma-{os.geteuid()}"):
            parent.mkdir(parents=True)
            parent.chmod(0o777)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        with pytest.raises(RdmaError, match="no place"):
            command.stand_in(str(library), "libibverbs.so.1")

    def test_a_path_with_a_blank_goes_by_a_link(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """LD_PRELOAD parts its entries at blanks and colons, and knows no quotes."""
        folder = tmp_path / "with a blank"
        folder.mkdir()
        (folder / "libusroce.so").touch()
        monkeypatch.setattr(seam, "USROCE_LIBRARY", str(folder / "libusroce.so"))
        made = command.program_environment(base={})
        assert " " not in made["LD_PRELOAD"]
        assert Path(made["LD_PRELOAD"]).resolve() == (folder / "libusroce.so").resolve()
        assert Path(made["LD_PRELOAD"]).name == "libusroce.so"


class TestRun:
    @pytest.fixture(autouse=True)
    def executed(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def execute(file: str, argv: list[str], environment: dict[str, str]) -> None:
            seen.update(file=file, argv=argv, environment=environment)
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("os.execvpe", execute)
        return seen

    def test_options_become_the_environment(
        self, executed: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = ["--address", "127.0.0.2, ::1", "--pcap", "x.pcap", "--fault", "drop=0.10,seed=3"]
        assert main(["usroce", "run", *line, "--", "ls", "--fault", "-l"]) == 126
        assert executed["argv"] == ["ls", "--fault", "-l"]
        settings = {k: v for k, v in executed["environment"].items() if k.startswith("AIORDMA_USROCE_")}
        assert settings["AIORDMA_USROCE_ADDRESS"] == "127.0.0.2,::1"
        assert settings["AIORDMA_USROCE_PCAP"] == "x.pcap"
        assert settings["AIORDMA_USROCE_FAULT"] == "drop=0.1,seed=3"
        assert "ls cannot be executed: Permission denied" in capsys.readouterr().err

    def test_no_such_program(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["usroce", "run", "--", "no-such-program"]) == 127
        assert "there is no program no-such-program" in capsys.readouterr().err

    def test_no_program(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["usroce", "run"]) == 1
        assert "usroce run -- PROGRAM" in capsys.readouterr().err

    @pytest.mark.parametrize("line", [["--fault", "drop=2"], ["--fault", "x"], ["--address", "eth0"]])
    def test_a_wrong_option(self, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["usroce", "run", *line, "--", "ls"])
        assert caught.value.code == 2
        assert "usage:" in capsys.readouterr().err


def test_a_real_device_has_no_faults() -> None:
    from aiordma.verbs import usroce

    class Real:
        name = "mlx5_0"
        is_usroce = False

        def check_open(self) -> None: ...

    context: Any = Real()
    for call in (
        lambda: usroce.set_fault(context, Fault(drop=1)),
        lambda: usroce.capture(context, "x.pcap"),
        lambda: usroce.counters(context),
    ):
        with pytest.raises(MisuseError, match="mlx5_0 is no usroce device"):
            call()
    assert not usroce.is_usroce(context)
    assert isinstance(Device.is_usroce, property)
