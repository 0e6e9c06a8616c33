"""The command line on a machine with a device."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aiordma.cli import main
from aiordma.verbs import devices

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
    name = devices()[0].name
    assert found["ok"] is True
    assert status["verbs library"] == "ok"
    assert status[f"device {name}"] == "ok"
    assert "ok" in [value for key, value in status.items() if key.startswith("port ")]
    assert "ok" in [value for key, value in status.items() if key.startswith("GID ")]
    assert "fork safety" in status
    assert f"limits of {name}" in status


def test_doctor_explains_the_gid_for_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    with devices()[0].open() as context:
        rows = [row for row in context.gids() if row.gid.ipv4_mapped]
    address = str(rows[0].address) if rows else "127.0.0.1"
    found = answer(capsys, "doctor", "--address", address)
    (gid, *_) = (f for f in found["findings"] if f["name"].startswith("GID "))
    assert address in gid["name"]
    assert "chosen" in gid["found"] or "LID addressing" in gid["found"]
