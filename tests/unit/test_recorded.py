# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import recorded
from capture.recorded import RamImage, RecordedMachine, VirtioMemState
from guard.errors import SourceError

MIB = 1 << 20
GIB = 1 << 30
Document = dict[str, Any]

GOOD: Document = {
    "format": 1,
    "arch": "x86_64",
    "capture_release": "6.12.107",
    "ram": [
        {"image": "ram.raw", "offset": 0, "paddr": 0, "size": 2 * GIB},
        {"image": "ram.raw", "offset": 2 * GIB, "paddr": 4 * GIB, "size": 62 * GIB},
    ],
    "root": "root",
    "virtio_mem": [
        {
            "addr": 128 * GIB,
            "region_size": 512 * MIB,
            "usable_region_size": 512 * MIB,
            "block_size": 2 * MIB,
            "plugged_size": 184549376,
            "requested_size": 184549376,
            "node_id": 0,
            "plugged": [[0, 80], [100, 8]],
            "image": "vm0.raw",
            "offset": 0,
        },
        {
            "addr": 129 * GIB,
            "region_size": 256 * MIB,
            "usable_region_size": 0,
            "block_size": 4 * MIB,
            "plugged_size": 0,
            "requested_size": 0,
            "plugged": [],
        },
    ],
}


def put(folder: Path, document: object, ram: int = 64 * GIB, vm0: int = 512 * MIB) -> str:
    """A recorded machine whose images have the given sizes and not one allocated block."""
    (folder / "machine.json").write_text(json.dumps(document))
    for name, size in (("ram.raw", ram), ("vm0.raw", vm0)):
        with (folder / name).open("wb") as stream:
            stream.truncate(size)
    return str(folder)


def test_machine_of_many_sparse_gigabytes_is_loaded(tmp_path: Path) -> None:
    machine = recorded.load(put(tmp_path, GOOD))
    assert machine.arch == "x86_64"
    assert machine.capture_release == "6.12.107"
    assert machine.ram[1] == RamImage("ram.raw", 2 * GIB, 4 * GIB, 62 * GIB)
    assert machine.virtio_mem[0].plugged == ((0, 80), (100, 8))
    assert machine.virtio_mem[1].image is None
    assert (machine.page_size, machine.phdr_note_align, machine.vmcoreinfo_paddr) == (4096, None, None)
    assert machine.root_path == str(tmp_path / "root")
    assert machine.resolve("ram.raw") == str(tmp_path / "ram.raw")
    assert machine.notes == ()
    assert os.stat(tmp_path / "ram.raw").st_blocks == 0


def test_only_what_cannot_be_guessed_is_needed(tmp_path: Path) -> None:
    document = {"format": 1, "arch": "s390x", "ram": [{"image": "ram.raw", "paddr": 0, "size": GIB}]}
    machine = recorded.load(put(tmp_path, document))
    assert machine == RecordedMachine(str(tmp_path), "s390x", (RamImage("ram.raw", 0, 0, GIB),))


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["comment"] = document["ram"][0]["comment"] = document["virtio_mem"][0]["comment"] = [None]
    recorded.load(put(tmp_path, document))


def test_image_elsewhere_is_allowed_and_told(tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    document = copy.deepcopy(GOOD)
    for name in ("a.raw", "b.raw"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(64 * GIB)
    document["ram"][0]["image"] = str(tmp_path / "a.raw")
    document["ram"][1]["image"] = "../b.raw"
    machine = recorded.load(put(tmp_path / "machine", document))
    assert machine.resolve(machine.ram[0].image) == str(tmp_path / "a.raw")
    assert len(machine.notes) == 2
    assert machine.notes[0].endswith(f"machine.json: ram[0].image: {tmp_path}/a.raw is outside the folder")
    assert machine.notes[1].endswith("machine.json: ram[1].image: ../b.raw is outside the folder")


def test_machine_comes_back_as_saved_and_a_second_save_changes_nothing(tmp_path: Path) -> None:
    machine = recorded.load(put(tmp_path, {**GOOD, "phdr_note_align": 4, "vmcoreinfo_paddr": 0x1234000}))
    recorded.save(str(tmp_path), machine)
    first = (tmp_path / "machine.json").read_text()
    assert recorded.load(str(tmp_path)) == machine
    recorded.save(str(tmp_path), machine)
    assert (tmp_path / "machine.json").read_text() == first
    assert json.loads(first)["virtio_mem"][0] == GOOD["virtio_mem"][0]
    assert '   "plugged": [[0, 80], [100, 8]],\n' in first
    assert first.endswith("\n}\n")
    assert sorted(os.listdir(tmp_path)) == ["machine.json", "ram.raw", "vm0.raw"]


def test_machine_that_contradicts_itself_is_not_saved(tmp_path: Path) -> None:
    machine = recorded.load(put(tmp_path, GOOD))
    before = (tmp_path / "machine.json").read_text()
    with pytest.raises(SourceError, match=r"machine\.json: ram: is empty"):
        recorded.save(str(tmp_path), machine._replace(ram=()))
    assert (tmp_path / "machine.json").read_text() == before


def test_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    machine = recorded.load(put(tmp_path, GOOD))
    (tmp_path / "other/machine.json").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"other/machine\.json: cannot be written: Is a directory"):
        recorded.save(str(tmp_path / "other"), machine)
    assert os.listdir(tmp_path / "other") == ["machine.json"]
    with pytest.raises(SourceError, match="cannot be written: No such file or directory"):
        recorded.save(str(tmp_path / "absent"), machine)


Change = Callable[[Document], object]


def ram0(**values: object) -> Change:
    return lambda d: d["ram"][0].update(values)


def vm0(**values: object) -> Change:
    return lambda d: d["virtio_mem"][0].update(values)


def top(**values: object) -> Change:
    return lambda d: d.update(values)


def without(*keys: str | int) -> Change:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


BAD: list[tuple[Change, str]] = [
    (without("format"), "format: is missing"),
    (top(format=2), "format: 2 is not known, expected 1"),
    (top(format=True), "format: true found, expected an integer"),
    (without("arch"), "arch: is missing"),
    (top(arch="riscv64"), "arch: 'riscv64' is not known, expected one of aarch64, s390x, x86_64"),
    (top(arch=None), "arch: null found, expected a string"),
    (top(arch="x" * 1000), "arch: 'xxx"),
    (top(capture_release=6.12), "capture_release: 6.12 found, expected a string"),
    (top(page_size=16384), "page_size: 16384 is not possible on x86_64, expected 4096"),
    (
        top(arch="aarch64", page_size=8192),
        "page_size: 8192 is not possible on aarch64, expected 4096 or 16384 or 65536",
    ),
    (top(phdr_note_align=8), "phdr_note_align: 8 is not possible, expected 0 or 4"),
    (top(vmcoreinfo_paddr="0x1000"), "vmcoreinfo_paddr: string '0x1000' found, expected an integer"),
    (top(root=7), "root: a number found, expected a string"),
    (top(root=""), "root: this string can be no file name"),
    (without("ram"), "ram: is missing"),
    (top(ram=[]), "ram: is empty, expected at least one range"),
    (top(ram={}), "ram: an object found, expected an array"),
    (top(ram=[7]), "ram[0]: a number found, expected an object"),
    (without("ram", 1, "image"), "ram[1].image: is missing"),
    (without("ram", 1, "paddr"), "ram[1].paddr: is missing"),
    (ram0(image=""), "ram[0].image: this string can be no file name"),
    (ram0(image="a\0b"), "ram[0].image: this string can be no file name"),
    (ram0(image="\ud800"), "ram[0].image: this string can be no file name"),
    (ram0(image=["ram.raw"]), "ram[0].image: an array found, expected a string"),
    (ram0(paddr=-4096), "ram[0].paddr: '-0x1000' is out of range, expected 0 to 0xffffffffffffffff"),
    (ram0(paddr=1 << 64), "ram[0].paddr: '0x10000000000000000' is out of range"),
    (ram0(paddr=10**4000), "ram[0].paddr: '0x"),
    (ram0(paddr=1e9), "ram[0].paddr: 1000000000.0 found, expected an integer"),
    (ram0(paddr=False), "ram[0].paddr: false found, expected an integer"),
    (ram0(size=float("nan")), "ram[0].size: NaN found, expected an integer"),
    (ram0(size=float("inf")), "ram[0].size: Infinity found, expected an integer"),
    (ram0(size=0), "ram[0].size: 0 found, expected at least one byte"),
    (ram0(paddr=(1 << 64) - 1, size=2), "ram[0].size: 2 bytes from paddr 0xffffffffffffffff on leave"),
    (ram0(size=4 * GIB + 1), "ram[1]: 0x100000000-0x107fffffff overlaps ram[0]: 0x0-0x100000000"),
    (ram0(paddr=5 * GIB), "ram[0]: 0x140000000-0x1bfffffff overlaps ram[1]: 0x100000000-0x107fffffff"),
    (vm0(addr=65 * GIB), "virtio_mem[0]: 0x1040000000-0x105fffffff overlaps ram[1]: 0x100000000-0x107fffffff"),
    (vm0(addr=129 * GIB), "virtio_mem[0]: 0x2040000000-0x205fffffff overlaps virtio_mem[1]: 0x2040000000-0x204fffffff"),
    (top(virtio_mem=None), "virtio_mem: null found, expected an array"),
    (top(virtio_mem=[[]]), "virtio_mem[0]: an array found, expected an object"),
    (vm0(block_size=3145728), "virtio_mem[0].block_size: 3145728 is not a power of two"),
    (vm0(block_size=0), "virtio_mem[0].block_size: 0 is not a power of two"),
    (vm0(block_size=2048), "virtio_mem[0].block_size: 2048 is smaller than a page of 4096 bytes"),
    (vm0(block_size=GIB), "virtio_mem[0].region_size: 536870912 is not a multiple of block_size 1073741824"),
    (vm0(addr=128 * GIB + 4096), "virtio_mem[0].addr: 137438957568 is not a multiple of block_size 2097152"),
    (vm0(region_size=0), "virtio_mem[0].region_size: 0 found, expected at least one block"),
    (vm0(addr=(1 << 64) - 2 * MIB), "virtio_mem[0].region_size: 536870912 bytes from addr 0xffffffffffe00000 on leave"),
    (vm0(usable_region_size=GIB), "virtio_mem[0].usable_region_size: 1073741824 is larger than region_size 536870912"),
    (vm0(usable_region_size=1), "virtio_mem[0].usable_region_size: 1 is not a multiple of block_size"),
    (vm0(requested_size=GIB), "virtio_mem[0].requested_size: 1073741824 is larger than region_size 536870912"),
    (vm0(node_id=65536), "virtio_mem[0].node_id: '0x10000' is out of range, expected 0 to 0xffff"),
    (
        vm0(plugged_size=2 * MIB),
        "virtio_mem[0].plugged_size: 2097152 contradicts plugged: 88 blocks of 2097152 bytes are",
    ),
    (without("virtio_mem", 0, "plugged"), "virtio_mem[0].plugged: is missing"),
    (
        vm0(plugged=[[0, 80], 100]),
        "virtio_mem[0].plugged[1]: a number found, expected an array [first block, number of",
    ),
    (vm0(plugged=[[0]]), "virtio_mem[0].plugged[0]: an array found, expected an array [first block, number of blocks]"),
    (vm0(plugged=[[0, "8"]]), "virtio_mem[0].plugged[0][1]: string '8' found, expected an integer"),
    (vm0(plugged=[[True, 8]]), "virtio_mem[0].plugged[0][0]: true found, expected an integer"),
    (vm0(plugged=[[0, 0]]), "virtio_mem[0].plugged[0][1]: 0 found, expected at least one block"),
    (vm0(plugged=[[100, 8], [0, 80]]), "virtio_mem[0].plugged[1]: starts at block 0, expected 108 or more"),
    (vm0(plugged=[[0, 80], [79, 8]]), "virtio_mem[0].plugged[1]: starts at block 79, expected 80 or more"),
    (
        vm0(plugged=[[250, 7]]),
        "virtio_mem[0].plugged[0]: ends with block 256, but usable_region_size has only 256 blocks",
    ),
    (
        vm0(usable_region_size=128 * MIB),
        "virtio_mem[0].plugged[0]: ends with block 79, but usable_region_size has only 64",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_bad_value_is_named_by_its_place(tmp_path: Path, change: Change, message: str) -> None:
    document = copy.deepcopy(GOOD)
    change(document)
    with pytest.raises(SourceError) as caught:
        recorded.load(put(tmp_path, document))
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/machine.json: {message}")
    assert line.isprintable()
    assert len(line) < len(str(tmp_path)) + 250


BAD_TEXT = [
    (b"", "machine.json:1:1: not JSON: Expecting value"),
    (b"[]", "machine.json: top level: an array found, expected an object"),
    (b'{\n "format": 1,\n "arch" "x"}', "machine.json:3:9: not JSON: Expecting ':' delimiter"),
    (b'{"format": 1,\n "arch": "\xff"}', "machine.json:2:11: byte is not UTF-8"),
    (b"\xef\xbb\xbf{}", "machine.json:1:1: not JSON: Unexpected UTF-8 BOM"),
    (b"[" * 100000, "machine.json: is nested too deeply"),
    (b'{"format": ' + b"9" * 5000 + b"}", "machine.json: holds a number of more digits than"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXT, ids=lambda v: str(v[:20]))
def test_text_that_is_no_document_is_named_by_line_and_column(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "machine.json").write_bytes(text)
    with pytest.raises(SourceError) as caught:
        recorded.load(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def load_error(folder: str) -> str:
    with pytest.raises(SourceError) as caught:
        recorded.load(folder)
    return str(caught.value)


def test_folder_without_machine_json_is_told(tmp_path: Path) -> None:
    assert load_error(str(tmp_path)) == f"{tmp_path}/machine.json: No such file or directory"


def test_machine_json_that_is_a_fifo_or_huge_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "machine.json")
    assert load_error(str(tmp_path)) == f"{tmp_path}/machine.json: is not a regular file"
    (tmp_path / "machine.json").unlink()
    with (tmp_path / "machine.json").open("wb") as stream:
        stream.truncate(GIB)
    assert "machine.json: has 1073741824 bytes, expected at most" in load_error(str(tmp_path))


def test_truncated_image_is_named_with_both_sizes(tmp_path: Path) -> None:
    place = f"{tmp_path}/machine.json: "
    line = load_error(put(tmp_path, GOOD, ram=64 * GIB - 1))
    assert line == f"{place}ram[1].image: {tmp_path}/ram.raw has 68719476735 bytes, expected at least 68719476736"
    line = load_error(put(tmp_path, GOOD, vm0=511 * MIB))
    assert line == f"{place}virtio_mem[0].image: {tmp_path}/vm0.raw has 535822336 bytes, expected at least 536870912"


def test_offset_counts_for_the_size_of_an_image(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["virtio_mem"][0]["offset"] = 4096
    assert "vm0.raw has 536870912 bytes, expected at least 536875008" in load_error(put(tmp_path, document))
    recorded.load(put(tmp_path, document, vm0=512 * MIB + 4096))


def test_missing_image_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path, GOOD)
    (tmp_path / "vm0.raw").unlink()
    line = load_error(folder)
    assert line == f"{folder}/machine.json: virtio_mem[0].image: {folder}/vm0.raw: No such file or directory"


def test_image_that_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    folder = put(tmp_path, GOOD)
    (tmp_path / "vm0.raw").unlink()
    os.mkfifo(tmp_path / "vm0.raw")
    assert load_error(folder).endswith("vm0.raw is neither a regular file nor a block device")
    (tmp_path / "vm0.raw").unlink()
    (tmp_path / "vm0.raw").mkdir()
    assert load_error(folder).endswith("vm0.raw is neither a regular file nor a block device")


def refusal(document: object) -> str | None:
    try:
        recorded.from_document(document, "folder")
    except SourceError as error:
        return str(error)
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, *GOOD["ram"][0]]), inner),
    max_leaves=12,
)


@given(JSON, st.sampled_from([(), ("ram",), ("ram", 0), ("ram", 0, "size"), ("virtio_mem", 0, "plugged"), ("root",)]))
def test_any_value_anywhere_is_taken_or_refused_in_one_line(value: object, place: tuple[Any, ...]) -> None:
    document: Any = copy.deepcopy(GOOD)
    if place:
        holder = document
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
    else:
        document = value
    line = refusal(document)
    assert line is None or (line.startswith("folder/machine.json: ") and line.isprintable())


@st.composite
def machines(draw: st.DrawFn) -> RecordedMachine:
    block_size = 1 << draw(st.integers(12, 30))
    gaps = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=20))
    runs, block = [], 0
    for gap, count in gaps:
        runs.append((block + gap, count))
        block += gap + count
    usable = block * block_size
    plugged = sum(count for _, count in runs) * block_size
    image = draw(st.none() | st.just("vm0.raw"))
    region = usable + block_size
    device = VirtioMemState(1 << 50, region, usable, block_size, plugged, plugged, 3, tuple(runs), image)
    ram = tuple(RamImage("ram é.raw", n << 20, n << 30, draw(st.integers(1, 1 << 30))) for n in range(3))
    align = draw(st.sampled_from([None, 0, 4]))
    return RecordedMachine(
        "", "aarch64", ram, (device,), "../root", None, 65536 if block_size >= 65536 else 4096, align
    )


@given(machines())
def test_every_sound_machine_survives_being_saved(
    tmp_path_factory: pytest.TempPathFactory, machine: RecordedMachine
) -> None:
    folder = tmp_path_factory.getbasetemp()
    recorded.save(str(folder), machine)
    document = json.loads((folder / "machine.json").read_text())
    assert recorded.from_document(document, "") == machine
