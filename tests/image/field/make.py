# SPDX-License-Identifier: LGPL-2.1-or-later
"""How base.tar.xz was made:

    .venv/bin/python -m tests.image.field.make BASE

BASE is a recorded machine with all of its memory, and live-truth.json beside its machine.json if there is one. The
fixture has what `oldmem record --minimal` writes of it, with the pages that any of several ways to look at it touch:
both layouts, both modes, without fw_cfg, without any copy of /sys and /proc, without a word on where the note is. The
printk log, the prepared header (elfcorehdr=) and what makedumpfile wants of the kernel itself are in it too. To be made
anew when more of old memory is read than was; the archive depends on BASE and on what is read of it, and on nothing
else."""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from capture import recorded
from capture.dump import CUT, DYNAMIC, KERNEL, PRELOADED, Dump
from capture.image_machine import ImageMachine
from capture.record import record_minimal
from capture.sources import files
from guard.errors import Error
from guard.physmem import FIRMWARE, LOG, Touched
from guard.witness.pagewalk import PageWalk, x86_64
from tests.image.field import ARCHIVE, FW_CFG, MACHINE, NOTE_PLACE, TRUTH

Change = Callable[[dict[str, Any], Path], None]


def _as_it_is(document: dict[str, Any], root: Path) -> None:
    pass


def _note_searched_for(document: dict[str, Any], root: Path) -> None:
    document.pop("vmcoreinfo_paddr", None)
    shutil.rmtree(root / NOTE_PLACE, ignore_errors=True)


def _without_fw_cfg(document: dict[str, Any], root: Path) -> None:
    _note_searched_for(document, root)
    shutil.rmtree(root / FW_CFG, ignore_errors=True)


def _without_root(document: dict[str, Any], root: Path) -> None:
    _note_searched_for(document, root)
    shutil.rmtree(root)
    root.mkdir()


VARIANTS: list[tuple[str, str, Change]] = [
    (CUT, DYNAMIC, _as_it_is),
    (KERNEL, DYNAMIC, _as_it_is),
    (CUT, PRELOADED, _as_it_is),
    (CUT, DYNAMIC, _note_searched_for),
    (CUT, DYNAMIC, _without_fw_cfg),
    (CUT, DYNAMIC, _without_root),
]


def _changed(base: Path, folder: Path, change: Change) -> Path:
    document = json.loads((base / "machine.json").read_text())
    for entry in document["ram"] + document["virtio_mem"]:
        entry["image"] = str(base / entry["image"])
    shutil.copytree(base / "root", folder / "root")
    for path, _, names in os.walk(folder / "root"):
        os.chmod(path, 0o755)
        for name in names:
            os.chmod(os.path.join(path, name), 0o644)
    change(document, folder / "root")
    (folder / "machine.json").write_text(json.dumps(document))
    return folder


def _touch(base: Path, touched: Touched) -> None:
    """Look at the machine in every way there is, and note what is read."""
    for layout, mode, change in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            machine = ImageMachine(recorded.load(str(_changed(base, Path(folder), change))))
            machine.touched = touched
            try:
                dump = Dump(machine, layout, mode)
            except Error as e:  # a way that this machine does not allow
                print(f"{layout}, {mode}: {e}", file=sys.stderr)
                machine.close()
                continue
            list(dump.map())
            _touch_log(dump)
            if change is not _without_root:
                _touch_prepared(dump)
            _touch_symbols(dump)
            dump.close()


def _touch_log(dump: Dump) -> None:
    """The printk ring buffer (kernel/printk/printk_ringbuffer.h), laid out by VMCOREINFO, whoever reads it."""
    assert dump.arch.info is not None
    info = dump.arch.info
    walk = x86_64(dump.exact.tagged(LOG), info)

    def size(name: str) -> int:
        return info.size(name) or 0

    def offset(name: str) -> int:
        return info.offset(name) or 0

    ring = walk.read_u64(info.symbol("prb") or 0)
    descs = ring + offset("printk_ringbuffer.desc_ring")
    text = ring + offset("printk_ringbuffer.text_data_ring")
    walk.read(ring, size("printk_ringbuffer"))
    count = 1 << walk.read_u32(descs + offset("prb_desc_ring.count_bits"))
    for member, one in (("descs", size("prb_desc")), ("infos", size("printk_info"))):
        _read(walk.read, walk.read_u64(descs + offset(f"prb_desc_ring.{member}")), count * one)
    bits = walk.read_u32(text + offset("prb_data_ring.size_bits"))
    _read(walk.read, walk.read_u64(text + offset("prb_data_ring.data")), 1 << bits)


def _touch_prepared(dump: Dump) -> None:
    """The header that the kernel was started with, in the memory that was set aside for it: four pages have room for
    its program headers. It is no old memory, so only the address is noted; the images have it."""
    found = re.search(rb"elfcorehdr=(?:\w+@)?(0x[0-9a-f]+|\d+)([KMG]?)", _cmdline(dump))
    assert found is not None
    shift = {b"": 0, b"K": 10, b"M": 20, b"G": 30}[found[2]]
    assert dump.machine.touched is not None
    dump.machine.touched.add(int(found[1], 0) << shift, 4 * 4096, FIRMWARE)


def _touch_symbols(dump: Dump) -> None:
    """What VMCOREINFO has the addresses of, by page tables: makedumpfile goes there where we take a shortcut."""
    info, dead = dump.arch.info, dump.arch.dead
    assert info is not None
    assert dead is not None
    walk = PageWalk(dump.exact, dead.walk.root_paddr, dead.walk.levels)
    for key in info.texts:
        if (vaddr := info.symbol(key.removeprefix("SYMBOL(").removesuffix(")"))) is not None:
            walk.read(vaddr, 512 if "uts_ns" in key else 8)


def _cmdline(dump: Dump) -> bytes:
    return (Path(dump.machine.root) / "proc/cmdline").read_bytes()


def _read(read: Callable[[int, int], bytes], vaddr: int, size: int) -> None:
    for at in range(0, size, 1 << 16):
        read(vaddr + at, min(1 << 16, size - at))


def _members(folder: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """All below *folder*, in an order and with attributes that do not depend on when and where."""
    for path in sorted(folder.rglob("*")):
        info = tarfile.TarInfo(str(path.relative_to(folder)))
        info.mode = 0o755 if path.is_dir() else 0o644
        if path.is_dir():
            info.type = tarfile.DIRTYPE
            yield info, None
        else:
            data = path.read_bytes()
            info.size = len(data)
            yield info, data


def make(base: Path, archive: Path) -> None:
    """Write *archive* from the recorded machine *base*."""
    touched = Touched(4096)
    _touch(base, touched)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seen: files.Seen = {}
        files.seen = seen
        machine = ImageMachine(recorded.load(str(base)))
        machine.touched = touched
        dump = Dump(machine)
        files.seen = None
        warn = lambda line: print(f"warning: {line}", file=sys.stderr)  # noqa: E731
        for line in record_minimal(dump, str(folder / MACHINE), seen, warn, with_log=True):
            print(line)
        dump.close()
        if (base / "live-truth.json").exists():
            shutil.copy(base / "live-truth.json", folder / TRUTH)
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for info, data in _members(folder):
                tar.addfile(info, None if data is None else io.BytesIO(data))
    archive.write_bytes(lzma.compress(stream.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{archive}: {archive.stat().st_size} bytes")


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve(), ARCHIVE)
