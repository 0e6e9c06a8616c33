"""The command line on a machine with a device."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aiordma.cli import main
from aiordma.verbs import devices
from aiordma.verbs.gid_choice import interface_addresses
from tests.conftest import device_under_test

pytestmark = pytest.mark.device


def answer(capsys: pytest.CaptureFixture[str], *line: str) -> Any:
    """Runs a command that must succeed and parses its JSON."""
    assert main([*line, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_devices_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "devices")
    assert found["error"] is None
    assert [d["name"] for d in found["devices"]] == [d.name for d in devices()]
    for device in found["devices"]:
        assert device["error"] is None
        assert device["ports"]
        assert {"port", "state", "link_layer", "active_mtu", "max_mtu", "lid", "max_message"} <= set(
            device["ports"][0]
        )
        assert all(
            set(row) == {"port", "index", "gid", "address", "type", "interface"} for row in device["gids"]
        )
        assert device["limits"]["max_qp_wr"] > 0


def test_devices_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    text = capsys.readouterr().out
    for device in devices():
        with device.open() as context:
            assert device.name in text
            assert context.attributes().node_guid in text
            assert all(row.gid.exploded in text for row in context.gids())


def test_doctor_finds_the_device_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "doctor")
    status = {finding["name"]: finding["status"] for finding in found["findings"]}
    name = device_under_test().name
    assert found["ok"] is True
    assert status["verbs library"] == "ok"
    assert status[f"device {name}"] == "ok"
    assert "ok" in [value for key, value in status.items() if key.startswith("port ")]
    assert "ok" in [value for key, value in status.items() if key.startswith("GID ")]
    assert "fork safety" in status
    assert f"limits of {name}" in status


def test_doctor_explains_the_gid_for_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    with device_under_test().open() as context:
        rows = [row for row in context.gids() if row.gid.ipv4_mapped]
    address = str(rows[0].address) if rows else "127.0.0.1"
    found = answer(capsys, "doctor", "--address", address)
    (gid,) = (f for f in found["findings"] if f["name"].startswith(f"GID of {device_under_test().name}"))
    assert address in gid["name"]
    assert "chosen" in gid["found"] or "LID addressing" in gid["found"]


@pytest.mark.usroce
class TestUsroce:
    def test_devices_says_which(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = {device["name"]: device for device in answer(capsys, "devices")["devices"]}
        device = found[device_under_test().name]
        assert device["usroce"] is True
        assert device["ports"][0]["link_layer"] == "ETHERNET"
        assert device["ports"][0]["state"] == "ACTIVE"
        assert {row["type"] for row in device["gids"]} == {"ROCE_V2"}
        assert main(["devices"]) == 0
        assert "RoCE v2 in user space" in capsys.readouterr().out

    def test_doctor_says_who_reaches_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AIORDMA_USROCE_ADDRESS", raising=False)
        found = {finding["name"]: finding for finding in answer(capsys, "doctor")["findings"]}
        addresses = found[f"addresses of {device_under_test().name}"]
        assert "127.0.0.1" in addresses["found"]
        assert "only this machine reaches" in addresses["found"]
        assert "AIORDMA_USROCE_ADDRESS" in addresses["fix"]
        assert found["UDP port 4791"]["status"] == "ok"
        assert found["socket buffers"]["status"] == "ok"

    def test_doctor_says_what_a_taken_port_means(self, capsys: pytest.CaptureFixture[str]) -> None:
        with device_under_test().open():
            found = {finding["name"]: finding for finding in answer(capsys, "doctor")["findings"]}
        assert "uses another port" in found["UDP port 4791"]["found"]
        assert "sends to 4791 only" in found["UDP port 4791"]["fix"]

    def test_doctor_says_what_to_set_for_another_address(self, capsys: pytest.CaptureFixture[str]) -> None:
        address = own_address()
        main(["doctor", "--json", "--address", address])
        found = json.loads(capsys.readouterr().out)["findings"]
        (gid,) = (f for f in found if f["name"].startswith(f"GID of {device_under_test().name}"))
        assert gid["status"] != "ok"
        assert f"AIORDMA_USROCE_ADDRESS={address}" in gid["fix"]


def own_address() -> str:
    """An address of this machine that is not loopback's."""
    for name, addresses in interface_addresses().items():
        if name != "lo":
            for address in addresses:
                if address.version == 4:
                    return str(address)
    pytest.skip("this machine has no address but loopback's")
