"""The measurement of LoRA switches: what it writes, and that it does not report where off is not off."""

import json
from pathlib import Path

import pytest

from bench import lora_switch
from fastsd.adapters import LoraAdapters


def measure(out: Path) -> None:
    assert lora_switch.main(["--preset", "bundled", "--device", "cpu", "--repeats", "1", "--out", str(out)]) == 0


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "cpu", "versions", "threads", "dtype", "changed_weights"} <= result.keys()
    times = result["milliseconds"]
    assert {"on", "another weight", "switch to another", "both", "off", "step"} <= times.keys()
    assert all(0 < row["least"] <= row["median"] <= row["most"] for row in times.values())
    assert "off gives back the first bits" in capsys.readouterr().out


def test_nothing_is_reported_where_bits_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraAdapters, "unload_lora_weights", lambda self: self.set_adapters(list(self._adapters), 1.0))
    with pytest.raises(SystemExit, match="has other bits than before the LoRAs"):
        measure(tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
