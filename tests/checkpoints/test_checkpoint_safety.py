"""Files that change under us, and memory: measured in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fastsd
from fastsd.checkpoints import open_folder
from fastsd.checkpoints import safetensors_file as reader
from fastsd.errors import CheckpointError
from tests.checkpoints.checkpoint_builders import UNET, join, meta_net, net_state, split

CPU = torch.device("cpu")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(fastsd.__file__).parents[1])])
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths})


RACE = """
import os, sys, torch, safetensors
from pathlib import Path
from fastsd.checkpoints import open_folder
file, how = Path(sys.argv[1]), sys.argv[2]
good = file.read_bytes()
def ones_after(damage):
    net = torch.nn.Linear(512, 2048, device="meta")
    if how == "fastsd":
        open_folder(file.parents[1]).load_weights("unet", net, torch.float32, torch.device("cpu"))
    else:  # the mapped load that fastsd avoids
        with safetensors.safe_open(file, "pt") as mapped:
            net.load_state_dict({name: mapped.get_tensor(name) for name in mapped.keys()}, assign=True)
    damage()
    print(all(bool((tensor == 1).all()) for tensor in net.state_dict().values()), flush=True)
def overwrite():
    with file.open("r+b") as handle:
        handle.seek(200)
        handle.write(b"\\xff" * (len(good) - 200))
ones_after(overwrite)
file.write_bytes(good)
ones_after(lambda: os.truncate(file, 100))
"""


def test_file_that_changes_after_loading(model: Path) -> None:
    """Overwritten, then truncated: neither reaches loaded weights. The control shows what a mapped load suffers."""
    content = safetensors.torch.save({"weight": torch.ones(2048, 512), "bias": torch.ones(2048)})
    (model / UNET).write_bytes(content)
    done = run(RACE, model / UNET, "fastsd")
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True"]), (
        f"weights changed, or the process died: {done}"
    )
    (model / UNET).write_bytes(content)
    control = run(RACE, model / UNET, "mapped")
    hurt = (control.returncode, control.stdout.split())
    assert hurt == (-signal.SIGBUS, ["False"]), f"a mapped load is not hurt, so this shows nothing: {control}"


def swap_when_read(monkeypatch: pytest.MonkeyPatch, path: Path, content: bytes) -> None:
    """Let `path` change between the check of its header and the read of its tensors."""
    original = reader.read_exactly

    def read_exactly(*arguments: object) -> bytes:
        path.write_bytes(content)
        return original(*arguments)

    monkeypatch.setattr(reader, "read_exactly", read_exactly)


def test_file_that_changes_between_check_and_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (model / UNET).read_bytes()
    header, data = split(good)
    # of the same size and as valid, so that only the header's digest tells: two tensors of one shape change places
    header["norm.weight"], header["norm.bias"] = header["norm.bias"], header["norm.weight"]
    text = json.dumps(header, separators=(",", ":")).encode()
    swapped = join(text.ljust(len(good) - len(data) - 8), data)
    assert len(swapped) == len(good)
    assert safetensors.torch.load(swapped)["norm.bias"].equal(net_state()["norm.weight"])
    for content in (swapped, good[:-1], good + b"\0", b""):
        assert content != good
        with monkeypatch.context() as patch:
            swap_when_read(patch, model / UNET, content)
            net = meta_net()
            with pytest.raises(CheckpointError, match=f"{UNET}: changed while it was being read"):
                open_folder(model).load_weights("unet", net, torch.float32, CPU)
        (model / UNET).write_bytes(good)
        open_folder(model).load_weights("unet", net, torch.float32, CPU)
        assert torch.equal(net.norm.weight, net_state()["norm.weight"])


MEMORY = """
import sys, torch
from pathlib import Path
from fastsd.checkpoints import open_folder
from fastsd.errors import CheckpointError
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
side, dtype = int(sys.argv[2]), getattr(torch, sys.argv[3])
folder = open_folder(Path(sys.argv[1]))
torch.ones(1000).aminmax()
net = torch.nn.Sequential(*(torch.nn.Linear(side, side, bias=False, device="meta") for _ in range(8)))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = peak()
try:
    folder.load_weights("unet", net, dtype, torch.device("cpu"))
    print(peak() - before, "loaded")
except CheckpointError as error:
    print(peak() - before, error)
"""


def measured(model: Path, side: int = 8, dtype: str = "float32") -> tuple[float, str]:
    """By how many MB loading raised the resident memory's peak, and how it ended."""
    done = run(MEMORY, model, side, dtype)
    assert done.returncode == 0, done.stderr
    rise, _, outcome = done.stdout.strip().partition(" ")
    return float(rise), outcome


def test_hostile_header_costs_no_memory(model: Path) -> None:
    """60 MB of header, 900,000 empty tensors: 1.2 GB when safetensors parses it."""
    entry = '"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % i for i in range(900_000)) + "}").encode()
    (model / UNET).write_bytes(join(header + b" " * (60 * 10**6 - len(header))))
    rise, outcome = measured(model)
    assert "more than 16 MB is refused" in outcome
    assert rise < 20, f"{rise:.0f} MB for a header that is refused by its length"


def test_header_within_the_cap_costs_little(model: Path) -> None:
    """The worst that fits 16 MB: JSON that Python's parser would blow up to a third of a gigabyte."""
    (model / UNET).write_bytes(join(b'{"a":[' + b"[]," * (5 * 2**20) + b"[]]}"))
    rise, outcome = measured(model)
    assert "more than 1,000,000 values" in outcome
    assert rise < 40, f"{rise:.0f} MB"


def test_peak_is_about_twice_the_file(model: Path) -> None:
    state = {f"{i}.weight": torch.ones(1024, 1024) for i in range(8)}  # 32 MB
    safetensors.torch.save_file(state, model / UNET)
    rise, outcome = measured(model, 1024, "float16")
    assert outcome == "loaded"
    assert 32 < rise < 2.2 * 32, f"{rise:.0f} MB for a file of 32 MB"
