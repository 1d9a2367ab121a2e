# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stage 2: kexec once more into the same kernel, with elfcorehdr= at a header of ours, which that kernel then serves as
its own /proc/vmcore, at its own speed, to every collector.

Who reads there is past our guard, so no page that a rule refuses may lie in any PT_LOAD. Everything that can be known
is checked before anything is changed; what was changed is undone if the jump does not take place. Memory of the dead
machine is not touched: the next kernel gets the memory map that this one was given."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

from capture import boot_image, elfcorehdr, kexec, losses, memory_map, stage_state
from capture.arch import Shape
from capture.boot_image import Initramfs, Kernel
from capture.dump import CUT, DYNAMIC, MAX_LOADS, Dump
from capture.elfcore import Core, Load
from capture.elfcorehdr import Prepared
from capture.header_place import InPlace, Pinned, Place
from capture.report import MOST_SERVED, as_json, bytes_text, guard_json, map_json
from capture.sources import cmdline
from capture.sources.report import Problems
from capture.stage_state import Meant
from guard.errors import Error, SourceError
from guard.physmem import ExactMemory
from guard.ranges import Range, RangeSet

HERE, BACK = "2", "back"
"""Values of oldmem.stage=: stage 2 itself, and the capture kernel that it went back to."""

TRIES = 4
_HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Options(NamedTuple):
    """What the user has asked for; None: to be found."""

    place: str | None = None  # "in-place" or "pinned"
    kernel: str | None = None
    initramfs: str | None = None


class GivenUp(NamedTuple):
    """Runs of readable memory, and their bytes, that the header has no room for."""

    runs: int
    size: int


class Plan(NamedTuple):
    """All that is decided before anything is done. *core* is the vmcore that the next kernel will serve, *running* the
    command line of this one."""

    place: Place
    why_not_in_place: str
    prepared: Prepared
    loads: list[Load]
    core: Core
    given_up: GivenUp
    kernel: Kernel
    initramfs: Initramfs
    running: str

    @property
    def cmdline(self) -> str:
        parameters = [*self.place.parameters(), f"{cmdline.STAGE}={HERE}"]
        return cmdline.rewritten(self.running, ("elfcorehdr", cmdline.STAGE), parameters)

    @property
    def header(self) -> bytes:
        return self.prepared.build(self.loads, self.place.addr)


def plan(dump: Dump, options: Options) -> Plan:
    """What :func:`go` would do. Changes nothing. Raises Error, which says what is in the way."""
    machine = dump.machine
    if not machine.live:
        raise Error("stage2 needs the machine itself: a recorded one has no kernel to go to")
    if machine.header_is_the_kernels:
        raise Error("this kernel built its header after the crash: there is none that stage2 could make better")
    if dump.shape is None or dump.layout != CUT or dump.mode != DYNAMIC:
        raise Error("stage2 builds its own header in layout cut: it takes no other layout and no preloaded one")
    running = running_cmdline()
    stage = cmdline.stage_of(running)
    if stage == HERE:
        raise Error("this is stage 2 already")
    if stage is not None:
        raise Error("this kernel was come back to from stage 2: that is tried once")
    kernel = boot_image.find_kernel(options.kernel, os.uname().release)
    initramfs = boot_image.find_initramfs(options.initramfs, kernel.release)
    prepared = elfcorehdr.prepare(dump.shape, ExactMemory(dump.memory))
    if not prepared.parts:
        # fs/proc/vmcore.c:merge_note_headers_elf64() has no room for notes then, and gives up
        raise Error("nothing is known of the dead kernel's notes: of a header without any no kernel makes a vmcore")
    for note in prepared.left_out:
        dump.problems.note(f"a note of {len(note.data)} bytes (a device dump) is left out: no kernel takes it at boot")
    shape = prepared.shape
    place, why_not, loads, given_up = _placed(dump, shape, prepared, options.place)
    made = Plan(place, why_not, prepared, loads, dump.served(shape, loads), given_up, kernel, initramfs, running)
    _check_cmdline(made)
    return made


def _check_cmdline(made: Plan) -> None:
    """A kernel that does not find elfcorehdr= there is none of kdump's: its virtio_mem driver would unplug all memory.
    Raises Error where it would not find what is meant."""
    line, most = os.fsencode(made.cmdline), made.kernel.most_cmdline
    if len(line) >= most:  # kexec counts the NUL too
        raise Error(f"a command line of {len(line)} bytes, of which {made.kernel.path} takes {most - 1}")
    found = cmdline.parse(line, "", Problems())
    if found.elfcorehdr is None or found.elfcorehdr.addr != made.place.addr or found.stage != HERE:
        raise Error(f"the next kernel would not find its header by the command line {made.cmdline!r}")


def running_cmdline() -> str:
    """Raises Error."""
    try:
        with open("/proc/cmdline", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError as e:
        raise Error(f"/proc/cmdline: {e.strerror}") from None


def _placed(dump: Dump, shape: Shape, prepared: Prepared, wanted: str | None) -> tuple[Place, str, list[Load], GivenUp]:
    """In place if all fits there; else in pinned pages, which have room for more; only then are runs given up."""
    text = list(text_loads(dump, shape))
    most = max(0, MAX_LOADS - len(text))
    in_place: InPlace | None = None
    why_not = ""
    if wanted != "pinned":
        try:
            in_place = InPlace(dump)
        except SourceError as e:
            if wanted:
                raise
            why_not = str(e)
    ranges, runs, size = memory_map.largest(servable_runs(dump), most)
    if in_place:
        room = max(0, min(prepared.most(in_place.room) - len(text), most))
        if len(ranges) > room:
            why_not = f"{in_place.room} bytes there hold {room} PT_LOADs of {len(ranges)}"
        if len(ranges) <= room or wanted:
            return _cut(in_place, why_not, room, text, ranges, shape, GivenUp(runs, size))
    try:
        pinned = Pinned(prepared.size(len(text) + len(ranges)))
    except SourceError as e:
        if in_place is None:
            raise Error(f"no place for a header: {why_not or 'not asked for in place'}; {e}") from None
        return _cut(in_place, why_not, room, text, ranges, shape, GivenUp(runs, size))
    return pinned, why_not, text + [shape.load(r) for r in ranges], GivenUp(runs, size)


def _cut(
    place: Place, why: str, room: int, text: list[Load], ranges: list[Range], shape: Shape, before: GivenUp
) -> tuple[Place, str, list[Load], GivenUp]:
    """*ranges* as far as there is *room*; *before* were given up already."""
    if room <= 0:
        raise Error(f"no room for a PT_LOAD {place.what}: {why}")
    ranges, runs, size = memory_map.largest(ranges, room)
    given_up = GivenUp(before.runs + runs, before.size + size)
    return place, why, text + [shape.load(r) for r in ranges], given_up


def gated_by_driver(dump: Dump) -> RangeSet:
    """Regions of virtio-mem devices that only the driver of this kernel gates, page by page while it is read: nothing
    tells what of them may stand in a header, and nothing that the next kernel has such a driver in time."""
    return RangeSet(device.region for device in dump.machine.devices if device.gated_by_kernel)


def servable_runs(dump: Dump) -> Iterator[Range]:
    """What may be read of old memory by who asks no guard, ascending."""
    gated = gated_by_driver(dump)
    for run in dump.readable_runs():
        yield from RangeSet([run]) - gated if gated else (run,)


def left_out(dump: Dump) -> RangeSet:
    """What was RAM and is in no PT_LOAD because nothing tells its state, or no source calls it RAM."""
    return RangeSet(loss.range for loss in losses.cut(dump)) | dump.registry.ram(gated_by_driver(dump))


def text_loads(dump: Dump, shape: Shape) -> Iterator[Load]:
    """Kernel text, without the pages of it that are refused."""
    if shape.text is None:
        return
    start, distance = shape.text.paddr, shape.text.vaddr - shape.text.paddr
    page = dump.machine.page_size
    end = start + shape.text.size
    whole = RangeSet([(start & -page, (end + page - 1) & -page)])
    for run in dump.registry.ram(whole) - gated_by_driver(dump):
        piece = Range(max(run.start, start), min(run.end, end))
        yield Load(piece.start, piece.start + distance, piece.size, shape.text.align)


def needed(made: Plan, initramfs_size: int) -> int:
    """Bytes of memory that loading takes at least, once there is the initramfs to load. kexec allocates the kernel's
    segment for all that it will need until it has unpacked itself (init_size), and holds its file beside that. What is
    missing beyond costs the process that loads, and nothing else."""
    return made.kernel.init_size + made.kernel.size + initramfs_size


def check_memory(made: Plan, initramfs_size: int | None = None) -> None:
    """Raises Error where loading would take more than there is. Without *initramfs_size*, the initramfs has yet to be
    put together, in memory too."""
    size = 2 * made.initramfs.least_size() if initramfs_size is None else initramfs_size
    need, have = needed(made, size), available()
    if need > have:
        raise Error(f"{bytes_text(need)} of memory needed to load stage 2, {bytes_text(have)} available")


def available() -> int:
    """Bytes that this kernel could still give. Raises Error."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    raise Error("/proc/meminfo: no MemAvailable")


def mounted_for_writing() -> list[str]:
    """Folders where a disk's file system is mounted for writing: it goes through the jump as through a crash."""
    found = []
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) > 3 and words[0].startswith("/dev/") and "rw" in words[3].split(","):
                found.append(words[1])
    return found


def described(made: Plan, dump: Dump) -> Iterator[str]:
    """What :func:`go` would do, a line each."""
    ram = sum(load.size for load in made.loads)
    yield f"header: {len(made.header)} bytes at {made.place.addr:#x}, {made.place.what} (room for {made.place.room})"
    if made.why_not_in_place:
        yield f"  {made.why_not_in_place}"
    yield f"PT_LOADs: {len(made.loads)} of {bytes_text(ram)}, none with a page that is refused"
    if made.given_up.runs:
        yield (
            f"  given up for want of room: the {made.given_up.runs} smallest runs of readable memory, "
            f"{bytes_text(made.given_up.size)}"
        )
    there, copied = made.prepared.there, sum(len(note.data) for note in made.prepared.copied)
    yield f"notes: {len(there)} where old memory has them, {copied} bytes copied"
    if made.prepared.left_out:
        size = sum(len(note.data) for note in made.prepared.left_out)
        yield f"  left out: {len(made.prepared.left_out)} notes of {bytes_text(size)}, which no kernel takes at boot"
    yield f"kernel: {made.kernel.path} ({bytes_text(made.kernel.size)}, {bytes_text(made.kernel.init_size)} in memory)"
    yield f"initramfs: {made.initramfs}"
    need = needed(made, 2 * made.initramfs.least_size())
    yield f"memory: {bytes_text(available())} available, at least {bytes_text(need)} needed to load it"
    if made.place.is_own_ram:
        yield "load: by kexec_file_load(2) if it tells its segments, else by kexec -c; none may lie over the header"
    else:
        yield "load: by kexec_file_load(2), else by kexec -c"
    yield f"command line: {made.cmdline}"
    for folder in mounted_for_writing():
        yield f"mounted for writing: {folder}, whose file system will find itself as after a crash"
    if lost := left_out(dump):
        yield f"left out: {lost}, whose state nothing tells"


def go(made: Plan, dump: Dump) -> None:
    """Load, place the header, jump. Raises Error with everything as it was, if that is not to be."""
    check_memory(made)
    fd = os.memfd_create("oldmem initramfs")
    try:
        boot_image.write_initramfs(made.initramfs, _state(made, dump), fd)
        check_memory(made, os.fstat(fd).st_size)
        _load(made, fd)
    finally:
        os.close(fd)
    jump(made.place, made.header)


def _load(made: Plan, fd: int) -> None:
    """Load it so that no segment lies over the header. Raises Error with nothing loaded."""
    for _ in range(TRIES):
        image = kexec.Image(made.kernel.path, fd, made.cmdline)
        loaded = kexec.load(image, made.place.is_own_ram)
        header = RangeSet([(made.place.addr, made.place.addr + made.place.room)])
        if loaded.segments is None or not loaded.segments & header:
            return
        kexec.unload()
        if not isinstance(made.place, Pinned):
            raise Error(f"{loaded.by}: a segment lies over the header's place, which is no RAM of this kernel")
        made.place.choose(loaded.segments)
    raise Error(f"segments lie over the header in each of {TRIES} places that were tried for it")


def jump(place: Place, header: bytes) -> None:
    """Place the header and go. Signals that end a process wait meanwhile: between the two nothing may stop."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        place.put(header)
        try:
            os.sync()
            place.check()
            if not kexec.is_loaded():
                raise Error("the kernel that was loaded is not there any more")
            kexec.jump()
        finally:
            place.take_back()
    finally:
        kexec.unload()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _state(made: Plan, dump: Dump) -> dict[str, bytes]:
    """What stage 2 needs to know what was meant, and to find the way back."""
    original = made.place.before(len(made.header))
    meant = Meant(
        made.running,
        made.place.addr if original else None,
        made.core.size,
        made.kernel.path,
        made.initramfs.path,
        made.given_up,
        tuple(left_out(dump)),
        dump.machine.phdr_note_align is not None,
    )
    return {
        stage_state.MEANT: meant.encode(),
        stage_state.HEAD: made.core.header,
        stage_state.ORIGINAL: original,
        stage_state.MAP: as_json(map_json(dump, MOST_SERVED)),
        stage_state.GUARD: as_json(guard_json(dump, MOST_SERVED)),
    }
