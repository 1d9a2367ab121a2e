# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writing the machine's state as a folder for --machine: what the capture environment knows, without the memory.

The memory is the host's to give: a guest's RAM file or a copy of it, put beside machine.json under the names that it
has. As QEMU lays its RAM out, one file holds what is below 4 GiB first and what is above behind it. A minimal record
has memory of its own: the pages that map, header and guard were made from (record_pages.py)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from capture import record_files
from capture.dump import Dump
from capture.recorded import CAPTURE_KERNEL, FILE, RamImage, RecordedMachine, VirtioMemState, save
from capture.sources import report
from capture.sources.files import Seen
from guard import whole_file
from guard.errors import Error
from guard.procvmcore import PATH as PROC_VMCORE
from guard.ranges import RangeSet

FOUR_GIB = 1 << 32
ROOT = "root"
_MARK = "record-incomplete"
"""A file beside the record as long as it is not whole."""
_OURS = (_MARK, ROOT, "pages.raw")


def ram_images(boot: RangeSet) -> list[RamImage]:
    """RAM of QEMU's boot map as one image: offset is address below 4 GiB, the rest follows without the hole."""
    low_end = max((r.end for r in boot if r.end <= FOUR_GIB), default=0)
    return [
        RamImage("ram.raw", r.start if r.end <= FOUR_GIB else r.start - FOUR_GIB + low_end, r.start, r.size)
        for r in boot
    ]


def record(dump: Dump, folder: str, seen: Seen) -> list[str]:
    """Write machine.json and root/ into *folder*, which must be empty or not there; *seen* is what the sources have
    read (capture.sources.files). Returns what was done, as lines. Raises Error, with nothing left in *folder*."""
    machine = dump.machine
    if machine.record is not None:
        raise Error(
            "record writes down the machine that this capture kernel came from; --machine names one that is "
            "(--minimal: the pages of it that are needed)"
        )
    _refuse(dump)
    info = dump.arch.info
    firmware = machine.reports["fw_cfg"].ranges(report.RAM) or dump.envelope.boot
    ram = ram_images(firmware)
    virtio = [v._replace(image=f"vm{i}.raw") for i, v in enumerate(_devices(dump))]
    found = RecordedMachine(
        folder,
        machine.arch.name,
        tuple(ram),
        tuple(virtio),
        capture_release=os.uname().release,
        page_size=machine.page_size,
        phdr_note_align=machine.phdr_note_align,
        vmcoreinfo_paddr=info.paddr if info else None,
        own_vmcoreinfo=machine.own_vmcoreinfo,
    )
    with _whole(folder):
        files = _files(dump, folder, seen)
        _save(folder, found)
    lines = [f"{files} files of /sys and /proc and {folder}/{FILE} written"]
    lines += [f"put the RAM at {r.paddr:#x}+{r.size:#x} into {r.image} at offset {r.offset:#x}" for r in ram]
    lines += [f"put the virtio-mem region at {v.addr:#x}+{v.region_size:#x} into {v.image}" for v in virtio]
    return lines


def record_minimal(
    dump: Dump, folder: str, seen: Seen, warn: Callable[[str], None], with_log: bool = False, force: bool = False
) -> list[str]:
    """As record(), with the pages that were touched (dump.machine.touched) in an image beside it. Pages of the printk
    log only *with_log*; *force* writes those too of which nothing tells whose they were."""
    from capture import record_pages

    machine = dump.machine
    _refuse(dump)
    choice = record_pages.choose(dump, with_log, force)
    path = os.path.join(folder, record_pages.IMAGE)
    with _whole(folder):
        files = _files(dump, folder, seen)
        with open(path, "wb") as image:
            written = record_pages.write(dump, choice, _devices(dump), image)
        _save(folder, _minimal(dump, folder)._replace(ram=written.ram, virtio_mem=written.virtio_mem))
    page = machine.page_size
    for pages, why in (
        (choice.others, "are not the kernel's own, but a user's or nobody's"),
        (choice.unseen, "have no struct page that tells whose they are (--force: write them all the same)"),
        ((choice.pages | choice.firmware) - written.pages, "could not be read again"),
    ):
        if pages:
            warn(f"not written: {pages.size // page} pages, the first at {next(iter(pages)).start:#x}, {why}")
    lines = [f"{written.pages.size // page} pages of memory, {files} files of /sys and /proc and {FILE} in {folder}"]
    if choice.log:
        lines.append(f"{choice.log.size // page} pages of the dead kernel's log left out (--with-log: write them)")
    return lines


def _minimal(dump: Dump, folder: str) -> RecordedMachine:
    """What is known of the machine but its memory, as those need it who were not there."""
    machine = dump.machine
    checks = machine.machine_checks
    if machine.record is None:
        found = RecordedMachine(
            *(folder, machine.arch.name, ()),
            capture_release=os.uname().release,
            page_size=machine.page_size,
            # what a search has found, the search through the record finds
            vmcoreinfo_paddr=machine.vmcoreinfo_paddr,
            seen_from=CAPTURE_KERNEL,
        )
    else:
        found = machine.record._replace(path=folder, root=ROOT)
    return found._replace(
        phdr_note_align=machine.phdr_note_align,
        own_vmcoreinfo=machine.own_vmcoreinfo,
        machine_checks=None if checks is None else tuple((r.start, r.end) for r in checks),
    )


def _refuse(dump: Dump) -> None:
    machine = dump.machine
    if machine.header_is_the_kernels or machine.arch.kernel_builds_header:
        raise Error(f"on {machine.arch.name} nothing needs recording: an image of all RAM is enough (--image)")
    if machine.live:
        unknown = [d.name for d in machine.devices if d.bitmap is None] or [name for name, _ in machine.unlocated]
        if unknown:
            raise Error(f"the plug state of {', '.join(unknown)} is not known: a record of it would be wrong")


def _devices(dump: Dump) -> list[VirtioMemState]:
    """The devices, without images; of a recorded machine as they are there."""
    machine = dump.machine
    if machine.record is not None:
        return list(machine.record.virtio_mem)
    return [
        VirtioMemState(
            d.region.start,
            d.region.size,
            *(d.usable, d.block_size, d.plugged_size, d.requested_size, d.node_id),
            tuple(((r.start - d.region.start) // d.block_size, r.size // d.block_size) for r in d.plugged),
            name=d.name,
        )
        for d in machine.devices
    ]


def _files(dump: Dump, folder: str, seen: Seen) -> int:
    """Write root/ and the kernel's own header into it; returns how many files of /sys and /proc were written."""
    machine = dump.machine
    root = os.path.join(folder, ROOT)
    files = record_files.write(root, machine.root, seen)
    if machine.core_header is not None:
        os.makedirs(os.path.join(root, "proc"), exist_ok=True)
        with open(root + PROC_VMCORE, "wb") as file:
            file.write(machine.core_header_bytes())
    return files


@contextlib.contextmanager
def _whole(folder: str) -> Iterator[None]:
    """Fill *folder*, for the user alone to read, or leave it as it was. machine.json has to be what is written last:
    whenever this process ends, there is a whole record or none that loads, and one that was left half is begun again.
    Raises Error."""
    made = False
    umask = os.umask(0o077)  # it may hold memory
    try:
        try:
            os.makedirs(folder)
            made = True
        except FileExistsError:
            there = sorted(set(os.listdir(folder)) - {"lost+found"})
            others = there if _MARK not in there else [n for n in there if n not in _OURS and not n.startswith(FILE)]
            if others or FILE in there:
                raise Error(
                    f"{folder}: is not empty ({[*others, FILE][0]}): a record needs a folder of its own"
                ) from None
        mark = whole_file.Begun(os.path.join(folder, _MARK))
        try:
            _empty(folder, _MARK)
            yield
            os.unlink(mark.beside)
        except BaseException:
            with contextlib.suppress(OSError):
                _empty(folder)
                if made:
                    os.rmdir(folder)
            raise
        finally:
            mark.close()
    except OSError as e:
        raise Error(f"{e.filename or folder}: {e.strerror}") from None
    finally:
        os.umask(umask)


def _save(folder: str, machine: RecordedMachine) -> None:
    """Write machine.json when all else is on the disk."""
    os.sync()  # thousands of small files of /sys: one by one it would take minutes
    save(folder, machine)


def _empty(folder: str, but: str = "lost+found") -> None:
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            if name != but:
                os.unlink(os.path.join(path, name))
        for name in folders:
            if name != "lost+found":
                os.rmdir(os.path.join(path, name))
