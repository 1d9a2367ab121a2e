# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples of docs/python.md, run as they are over a recorded machine; drgn and volatility3 must see what the guard
lets be seen, byte for byte. The plug-in's example is tested in test_plugins.py."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import drgn
import pytest
from volatility3.framework import contexts, exceptions

from capture.guarded import MachineMemory, open_machine
from guard.compiled import write_guard
from tests.image.machines import BLOCK, DEVICE, GIB, HIGH, PAGE, SMALL, VMCOREINFO_AT, RecordedKernel, plugged_spans

DOCS = Path(__file__).resolve().parents[2] / "docs"
UNPLUGGED = plugged_spans()[0][1]  # the block behind the first plugged ones


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedKernel:
    """Little RAM, a fragmented virtio-mem device, and a dead kernel whose image is in its page tables."""
    machine = RecordedKernel()
    machine.shrink()
    kernel = machine.kernel
    kernel.keys["SYMBOL(swapper_pg_dir)"] = kernel.keys["SYMBOL(init_top_pgt)"]
    kernel.tables.map(kernel.text_vaddr, kernel.text_paddr, 21)
    machine.finish_kernel()
    machine.folder = machine.write(tmp_path_factory.mktemp("machine"))  # type: ignore[attr-defined]
    return machine


@pytest.fixture(scope="module")
def folder(recorded: RecordedKernel) -> Path:
    return Path(recorded.folder)  # type: ignore[attr-defined]


@pytest.fixture
def memory(folder: Path) -> Iterator[MachineMemory]:
    with open_machine(str(folder)) as opened:
        yield opened


def run(name: str, *arguments: object) -> list[str]:
    command = [sys.executable, str(DOCS / "examples" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout.splitlines()


def around(memory: MachineMemory) -> list[int]:
    """Pages on both sides of every border that the device has, and some with something in them."""
    borders = [at for span in plugged_spans() for at in span]
    return [VMCOREINFO_AT, HIGH[0], *(at + by for at in borders for by in (-PAGE, 0)), DEVICE[1] - PAGE]


def expected(recorded: RecordedKernel, paddr: int) -> bytes:
    readable = any(a <= paddr < b for a, b in [*SMALL, *plugged_spans()])
    return recorded.pages.get(paddr, bytes(PAGE)) if readable else bytes(PAGE)


def test_drgn_example_reads_the_kernels_release_and_tells_what_was_refused(folder: Path) -> None:
    release, ram, unplugged, counted = run("drgn_guarded", folder, hex(HIGH[0]), hex(UNPLUGGED))
    assert release == "6.12.0-test"
    assert ram == f"{HIGH[0]:#x}: {(HIGH[0] | 1).to_bytes(8, 'little').hex() * 2}"
    assert unplugged == f"{UNPLUGGED:#x}: {bytes(16).hex()} (virtio-mem {DEVICE[0]:#x}: unplugged)"
    assert counted == f"{{'virtio-mem {DEVICE[0]:#x}': 1}}"


def test_drgn_sees_the_guarded_bytes_and_zeros_for_what_is_refused(
    recorded: RecordedKernel, memory: MachineMemory
) -> None:
    prog = example("drgn_guarded").program(memory)
    for paddr in around(memory):
        found = prog.read(paddr, PAGE, physical=True)
        assert found == memory.read(paddr, PAGE) == expected(recorded, paddr), hex(paddr)
    info = memory.dump.arch.info
    assert info
    section = info.symbol("mem_section")  # by the direct map
    assert section
    paddr = section - recorded.kernel.page_offset
    assert prog.read(section, 4096) == memory.read_exact(paddr, 4096)
    with pytest.raises(drgn.FaultError):
        prog.read(memory.end, 1, physical=True)


def test_volatility_example_scans_ram_and_walks_the_page_tables(folder: Path) -> None:
    assert run("volatility3_layer", folder) == [f"VMCOREINFO at {VMCOREINFO_AT + 12:#x}", "6.12.0-test"]


def test_volatility_layer_gives_the_guarded_bytes_and_refused_pages_are_invalid_addresses(
    recorded: RecordedKernel, folder: Path
) -> None:
    context: Any = contexts.Context()
    layer = example("volatility3_layer").add_layers(context, str(folder))
    refused = 0
    for paddr in around(layer.memory):
        wanted = expected(recorded, paddr)
        assert layer.read(paddr, PAGE, pad=True) == wanted == context.layers["memory"].read(paddr, PAGE, pad=True)
        assert layer.is_valid(paddr, PAGE) == layer.is_valid(paddr) == (paddr in layer.memory)
        if layer.is_valid(paddr):
            assert layer.read(paddr, PAGE) == wanted
        else:
            refused += 1
            with pytest.raises(exceptions.InvalidAddressException, match=r"refused by (virtio-mem|envelope)") as caught:
                layer.read(paddr, PAGE)
            assert caught.value.invalid_address == paddr
    assert refused
    assert layer.memory.counters().bytes_refused == 2 * refused * PAGE
    assert (layer.minimum_address, layer.maximum_address) == (0, DEVICE[1] - 1)
    assert not layer.is_valid(-1)
    assert not layer.is_valid(HIGH[0], 0)
    with pytest.raises(NotImplementedError, match="nothing is written"):
        layer.write(HIGH[0], b"x")
    layer.destroy()
    with pytest.raises(ValueError, match="closed"):
        layer.read(HIGH[0], 8, pad=True)


def test_a_machines_memory_is_what_its_vmcore_holds(memory: MachineMemory) -> None:
    vmcore = memory.dump.vmcore
    for extent in memory.dump.core.extents[1:]:
        for at in {0, extent.size // PAGE // 2 * PAGE, extent.size - PAGE}:
            assert memory.read(extent.paddr + at, PAGE) == vmcore.read(extent.offset + at, PAGE)
    assert sum(r.size for r in memory) == memory.dump.readable().size


def test_the_pages_code_runs_as_it_stands_there(
    recorded: RecordedKernel, memory: MachineMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block of docs/python.md, over the rules and an image of this machine."""
    text = (DOCS / "python.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    write_guard(memory.dump.registry, str(tmp_path / "machine.guard"))
    (tmp_path / "low.raw").write_bytes(memory.read(0, 0x300000))
    with open(tmp_path / "high.raw", "wb") as file:
        file.truncate(BLOCK)
        file.write(b"high")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[0].replace("        ...", "        found = start, end"), names)
    assert names["page"] == memory[0x100000:0x101000]
    assert names["found"] == (4 * GIB, 4 * GIB + BLOCK)
    assert (DOCS / "examples/rule_plugin.py").read_text().endswith(code[1])
