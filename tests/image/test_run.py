# SPDX-License-Identifier: LGPL-2.1-or-later
"""``oldmem run`` over images: programs get the guarded bytes in every way of reading, and nothing but these."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from capture.run import LIBRARY, PLAN_VARIABLE
from tests.image.conftest import Recorded
from tests.image.machines import DEVICE, LOW, PAGE, RecordedKernel, copied, device_load, oldmem, plugged_spans
from tests.pace import patience

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")

COLLECTOR = Path(__file__).with_name("collector.py")
MIB = 1 << 20


def run(
    folder: Path, *command: str | Path, options: tuple[str | Path, ...] = (), **more: object
) -> subprocess.CompletedProcess[str]:
    line: list[str | Path] = [sys.executable, "-m", "capture", "run", "--machine", folder, *options, "--", *command]
    return subprocess.run(line, capture_output=True, text=True, timeout=patience(100), **more)  # type: ignore[call-overload, no-any-return]


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("exists", [False, True], ids=["no file of that name", "a file of that name"])
def test_every_way_of_reading_gives_the_bytes_of_the_saved_file(
    small_machine: Recorded, saved_small: Path, tmp_path: Path, seed: int, exists: bool
) -> None:
    vmcore = tmp_path / "vmcore"
    if exists:
        vmcore.write_text("not this")
    options = ("--layout", "kernel", "--vmcore", vmcore)
    done = run(small_machine.folder, sys.executable, COLLECTOR, vmcore, saved_small, str(seed), options=options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "same\n", "")
    assert not exists or vmcore.read_text() == "not this"


@pytest.mark.parametrize(
    "line",
    [
        "sha256sum <{0}",
        "sha256sum {0}",  # stdio
        "cat {0} | sha256sum",
        "cat <{0} | sha256sum",  # opened by one program, read by another
        "exec 7<{0}; dd bs=1M status=none <&7 | sha256sum",
        "dd if={0} bs=1M status=none | sha256sum",
        "dd if={0} bs=4097 status=none | sha256sum",
        "cp --sparse=always {0} {1}; sha256sum <{1}",
        "cp {0} {1}; sha256sum <{1}",
        "cd $(dirname {0}); cat vmcore | sha256sum",
        "tail -c +1 {0} | sha256sum",
    ],
)
def test_common_programs_copy_all_of_it(small_machine: Recorded, saved_small: Path, tmp_path: Path, line: str) -> None:
    vmcore = tmp_path / "vmcore"
    command = line.format(vmcore, tmp_path / "copy")
    options = ("--layout", "kernel", "--vmcore", vmcore)
    done = run(small_machine.folder, "bash", "-o", "pipefail", "-c", command, options=options)
    saved = subprocess.run(["sha256sum", saved_small], capture_output=True, text=True, timeout=60, check=True).stdout
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == saved.split()[0]


@pytest.mark.parametrize("opener", ["", "exec 7<{0}; "], ids=["opened by the reader", "opened by another program"])
def test_refused_pages_with_something_in_them_are_zeros(small_machine: Recorded, tmp_path: Path, opener: str) -> None:
    denied = [paddr for paddr in small_machine.pages if paddr >= DEVICE[0]]
    assert len(denied) > 2
    options: list[str | Path] = ["--layout", "kernel"]
    for paddr in denied[::2]:
        options += ["--deny", f"{paddr:x}-{paddr + 4095:x}"]
    saved, vmcore, out = (tmp_path / name for name in ("saved", "vmcore", "out"))
    assert oldmem("save", *options, "--machine", small_machine.folder, "-o", saved).status == 0
    readers = [f"dd bs=64k status=none {'<&7' if opener else 'if={0}'}"]
    readers.append(f"{sys.executable} {COLLECTOR.with_name('mapper.py')} {7 if opener else '{0}'}")
    for reader in readers:
        command = f"{opener}{reader} >{{1}}".format(vmcore, out)
        done = run(small_machine.folder, "bash", "-c", command, options=(*options, "--vmcore", vmcore))
        assert (done.returncode, done.stderr) == (0, ""), reader
        assert filecmp.cmp(out, saved, shallow=False), reader


def test_status_of_the_command_is_its_own(small_machine: Recorded, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 9\n")
    for command, status in ((["bash", "-c", "exit 7"], 7), (["bash", "-c", "kill -9 $$"], 137), (["true"], 0)):
        done = run(small_machine.folder, *command)
        assert (done.returncode, done.stderr) == (status, "")
    done = run(small_machine.folder, "no-such-command")
    assert (done.returncode, done.stderr) == (127, "oldmem: no-such-command: No such file or directory\n")
    done = run(small_machine.folder, "")
    assert (done.returncode, done.stderr) == (127, "oldmem: '': No such file or directory\n")
    done = run(small_machine.folder, os.fsdecode(b"no-such\xff"))
    assert (done.returncode, done.stderr) == (127, "oldmem: no-such\\udcff: No such file or directory\n")
    done = run(small_machine.folder, script)
    assert (done.returncode, done.stderr) == (126, f"oldmem: {script}: Permission denied\n")
    script.chmod(0o755)
    assert run(small_machine.folder, script).returncode == 9
    assert run(small_machine.folder).returncode == 2


def test_signal_that_ends_the_command_is_passed_on(small_machine: Recorded) -> None:
    line: list[str | Path] = [sys.executable, "-m", "capture", "run", "--machine", small_machine.folder, "--"]
    command = ["bash", "-c", "trap 'echo heard; exit 5' TERM; echo up; while :; do sleep 0.1; done"]
    with subprocess.Popen([*line, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == "heard\n"
        assert process.returncode == 5


def test_environment_keeps_what_was_preloaded_already(small_machine: Recorded) -> None:
    environment = os.environ | {"LD_PRELOAD": "libc.so.6"}
    done = run(small_machine.folder, "bash", "-c", "echo $LD_PRELOAD", env=environment)
    first, second = done.stdout.strip().split(":")
    assert os.path.basename(first) == "_preload.abi3.so"
    assert second == "libc.so.6"


def test_report_has_what_was_refused_and_what_was_read(small_machine: Recorded, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--layout", "kernel", "--report", report)
    done = run(small_machine.folder, "bash", "-c", "cat /proc/vmcore >/dev/null", options=options)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(report.read_text())
    refused = {r["name"]: r["page_reads_refused"] for r in told["rules"]}
    unplugged = next(pages for name, pages in refused.items() if name.startswith("virtio-mem"))
    assert unplugged == 12 * 512  # blocks 16 to 19 and 24 to 31 of 2 MiB
    assert told["bytes_read"] >= 20 * 2 * MIB
    assert told["unreadable"] == []


def test_report_that_cannot_be_written_costs_neither_the_commands_status_nor_what_was_lost(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.shrink()
    machine.finish_kernel()
    machine.write(made(tmp_path / "machine"))
    cut = f"truncate -s {LOW[1] + 4 * PAGE} {tmp_path}/machine/ram.raw; cat /proc/vmcore >/dev/null; exit"
    for status, expected in ((7, 7), (0, 1)):
        options = ("--report", tmp_path / "nowhere/report")
        done = run(tmp_path / "machine", "bash", "-c", f"{cut} {status}", options=options)
        assert done.returncode == expected
        *lost, last = done.stderr.splitlines()
        assert last == f"oldmem: {tmp_path}/nowhere/report: No such file or directory"
        assert any("could not be read and is zeros" in line for line in lost)
        machine.write(tmp_path / "machine")


def test_image_cut_while_it_is_mapped_costs_what_was_cut_and_is_told(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.shrink()
    machine.finish_kernel()
    folder = machine.write(made(tmp_path / "machine"))
    device, end = folder / "vm0.raw", plugged_spans()[-1][1] - DEVICE[0]
    reader = (
        "import mmap, os, sys\n"
        "fd = os.open('/proc/vmcore', os.O_RDONLY)\n"
        "n = os.fstat(fd).st_size\n"
        "whole = mmap.mmap(fd, n, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
        f"os.truncate({str(device)!r}, {end - MIB})\n"
        "mapped = whole[:]\n"
        "assert mapped == os.pread(fd, n, 0)\n"
        "whole.close()\n"
        "sys.stdout.buffer.write(mapped)\n"
    )
    out = tmp_path / "out"
    with open(out, "wb") as file:
        line: list[str | Path] = [
            sys.executable,
            "-m",
            "capture",
            "run",
            "--machine",
            folder,
            "--",
            sys.executable,
            "-c",
            reader,
        ]
        done = subprocess.run(line, stdout=file, stderr=subprocess.PIPE, text=True, timeout=100)
    whole = machine.write(made(tmp_path / "whole"))
    saved = tmp_path / "saved"
    assert oldmem("save", "--machine", whole, "-o", saved).status == 0
    assert done.returncode == 4, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert "could not be read and is zeros: Bad address" in lines[0]
    ours, theirs = out.read_bytes(), saved.read_bytes()
    assert len(ours) == len(theirs)
    different = [i for i in range(0, len(ours), 4096) if ours[i : i + 4096] != theirs[i : i + 4096]]
    assert all(not any(ours[i : i + 4096]) for i in different)
    assert len(different) * 4096 <= MIB


def test_image_cut_in_the_middle_of_a_page_is_told(small_machine: Recorded, saved_small: Path, tmp_path: Path) -> None:
    folder = copied(small_machine.folder, tmp_path / "machine")
    script = (
        "import os, sys\n"
        "fd = os.open('/proc/vmcore', os.O_RDONLY)\n"
        "size = os.fstat(fd).st_size\n"
        "whole = os.pread(fd, size, 0)\n"
        "os.truncate(sys.argv[1], (3 << 20) + 100)\n"
        "os.pread(fd, 4096, int(sys.argv[2]) + (3 << 20))\n"
    )
    where = (folder / "vm0.raw", str(device_load(saved_small).offset))
    done = run(folder, sys.executable, "-c", script, *where, options=("--layout", "kernel"))
    at = DEVICE[0] + (3 << 20)
    line = f"oldmem: warning: {at:#x}-{at + 4095:#x} could not be read and is zeros: Bad address\n"
    assert (done.returncode, done.stderr) == (4, line)


def test_every_page_that_is_lost_is_told_in_whatever_order_pages_fail(
    small_machine: Recorded, saved_small: Path, tmp_path: Path
) -> None:
    folder = copied(small_machine.folder, tmp_path / "machine")
    with open(folder / "vm0.raw", "rb") as file:
        assert os.fstat(file.fileno()).st_size >= 32 * 2 * MIB
    script = (
        "import mmap, os, random, sys\n"
        "offset, size, image = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]\n"
        "fd = os.open('/proc/vmcore', os.O_RDONLY)\n"
        "whole = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=offset)\n"
        "os.truncate(image, 0)\n"
        "pages = [at for at in range(0, size, 4096) if at // 4096 % 5]\n"
        "random.shuffle(pages)\n"
        "assert not any(whole[at] for at in pages)\n"
    )
    report = tmp_path / "report.json"
    size = 16 * 2 * MIB  # the first 16 blocks are plugged
    where = (str(device_load(saved_small).offset), str(size), folder / "vm0.raw")
    options = ("--layout", "kernel", "--report", report)
    done = run(folder, sys.executable, "-c", script, *where, options=options)
    assert done.returncode == 4, done.stderr
    told = json.loads(report.read_text())
    listed = sum(r["end"] - r["start"] for r in told["unreadable"]) // 4096
    assert listed + told["unlisted_faults"] == sum(1 for at in range(0, size, 4096) if at // 4096 % 5)
    assert all(r["end"] - r["start"] <= 4 * 4096 for r in told["unreadable"])


def test_memory_in_too_many_pieces_to_map_at_once_is_read(image_machine: Recorded, tmp_path: Path) -> None:
    denied = tmp_path / "denied"
    pages = [page for a, b in plugged_spans() for page in range(a, b, 2 * 4096)]
    denied.write_text("".join(f"{page:x}-{page + 4095:x}\n" for page in pages))
    assert len(pages) > 16384
    saved = tmp_path / "saved"
    options: tuple[str | Path, ...] = ("--layout", "kernel", "--deny", denied)
    assert oldmem("save", *options, "--machine", image_machine.folder, "-o", saved).status == 0
    device = device_load(saved)
    script = (
        "import errno, mmap, os, sys\n"
        "ours, theirs = (os.open(p, os.O_RDONLY) for p in sys.argv[1:3])\n"
        "start, size = map(int, sys.argv[3:])\n"
        "with mmap.mmap(ours, size, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=start) as whole:\n"
        "    for at in range(0, size, 1 << 20):\n"
        "        assert whole[at : at + 4096] == os.pread(theirs, 4096, start + at), at\n"
        "for at in range(start, start + size, 1 << 20):\n"
        "    assert os.pread(ours, 1 << 20, at) == os.pread(theirs, 1 << 20, at), at\n"
        "    with mmap.mmap(ours, 1 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=at) as m:\n"
        "        assert m[:] == os.pread(theirs, 1 << 20, at), at\n"
        "assert sum(1 for _ in open('/proc/self/maps')) < 16 * 1024 * 2 + 1024\n"
    )
    where = (str(device.offset), str(device.memsz))
    done = run(image_machine.folder, sys.executable, "-c", script, "/proc/vmcore", saved, *where, options=options)
    assert (done.returncode, done.stderr) == (0, "")


def test_collector_whose_oldmem_was_killed_reads_on(small_machine: Recorded, saved_small: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "ours, theirs = (os.open(p, os.O_RDONLY) for p in sys.argv[1:])\n"
        "os.pread(ours, 64, 0)\n"
        "oldmem = os.getppid()\n"
        "os.kill(oldmem, signal.SIGKILL)\n"
        "while os.getppid() == oldmem:\n"
        "    time.sleep(0.01)\n"
        "for at in range(0, os.fstat(theirs).st_size, 1 << 20):\n"
        "    assert os.pread(ours, 1 << 20, at) == os.pread(theirs, 1 << 20, at), at\n"
        "print('same', flush=True)\n"
    )
    options = ("--layout", "kernel")
    done = run(small_machine.folder, sys.executable, "-c", script, "/proc/vmcore", saved_small, options=options)
    assert done.returncode == -signal.SIGKILL
    assert (done.stdout, done.stderr) == ("same\n", "")


def test_collector_that_closes_what_it_never_opened_gets_no_other_files_bytes(
    small_machine: Recorded, saved_small: Path
) -> None:
    script = (
        "import mmap, os, sys\n"
        "first = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.pread(first, 64, 0)\n"
        "os.closerange(3, 4096)\n"
        "taken = [os.open('/dev/zero', os.O_RDONLY) for _ in range(600)]\n"
        "ours, theirs = (os.open(p, os.O_RDONLY) for p in sys.argv[1:])\n"
        "for at in range(0, os.fstat(theirs).st_size, 1 << 20):\n"
        "    there = os.pread(theirs, 1 << 20, at)\n"
        "    assert os.pread(ours, 1 << 20, at) == there, at\n"
        "    with mmap.mmap(ours, len(there), mmap.MAP_PRIVATE, mmap.PROT_READ, offset=at) as m:\n"
        "        assert m[:] == there, at\n"
        "assert all(os.read(fd, 1) == bytes(1) for fd in taken)\n"  # none of them was closed
    )
    options = ("--layout", "kernel")
    done = run(small_machine.folder, sys.executable, "-c", script, "/proc/vmcore", saved_small, options=options)
    assert (done.returncode, done.stderr) == (0, "")


def test_collector_without_room_for_more_mappings_gets_the_bytes(small_machine: Recorded, saved_small: Path) -> None:
    script = (
        "import mmap, os, sys\n"
        "ours, theirs = (os.open(p, os.O_RDONLY) for p in sys.argv[1:])\n"
        "size, held = os.fstat(theirs).st_size, [None] * 70000\n"
        "a, b = bytearray(1 << 20), bytearray(1 << 20)\n"
        "def compare():\n"
        "    for at in range(0, size, 1 << 20):\n"
        "        assert os.preadv(ours, [a], at) == os.preadv(theirs, [b], at) and a == b, at\n"
        "flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS\n"
        "for i in range(len(held)):\n"
        "    prot = mmap.PROT_READ | i % 2 * mmap.PROT_WRITE\n"  # so that neighbours are not merged
        "    try:\n"
        "        held[i] = mmap.mmap(-1, 4096, flags, prot)\n"
        "    except (OSError, MemoryError):\n"
        "        break\n"
        "assert i < 69999\n"
        "for room in (0, 1, 2, 4, 100):\n"
        "    held[i - room : i] = [None] * room\n"
        "    compare()\n"
    )
    options = ("--layout", "kernel")
    done = run(small_machine.folder, sys.executable, "-c", script, "/proc/vmcore", saved_small, options=options)
    assert (done.returncode, done.stderr) == (0, "")


def test_vmcore_whose_memory_lies_across_pages_of_the_file_is_read_all_the_same(
    small_machine: Recorded, saved_small: Path
) -> None:
    script = (
        "import sys\n"
        "from capture import cli, elfcore\n"
        "from capture.elfcore import Extent\n"
        "build = elfcore.build\n"
        "def shifted(*a, **k):\n"
        "    core = build(*a, **k)\n"
        "    return core._replace(extents=tuple(Extent(o + 8, s, p) for o, s, p in core.extents))\n"
        "elfcore.build = shifted\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )
    compare = (
        "import mmap, os\n"
        "ours = os.open('/proc/vmcore', os.O_RDONLY)\n"
        "n = os.fstat(ours).st_size\n"
        "with mmap.mmap(ours, n, mmap.MAP_PRIVATE, mmap.PROT_READ) as whole:\n"
        "    assert whole[:] == os.pread(ours, n, 0) and any(whole[1 << 20:])\n"
    )
    line: list[str | Path] = [sys.executable, "-c", script, "run", "--machine", small_machine.folder, "--"]
    done = subprocess.run([*line, sys.executable, "-c", compare], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_image_that_does_not_hold_memory_at_whole_pages_is_read_all_the_same(tmp_path: Path) -> None:
    machine = RecordedKernel()
    machine.shrink()
    machine.finish_kernel()
    machine.document["virtio_mem"][0]["offset"] = 512
    folder = machine.write(made(tmp_path / "machine"))
    with open(folder / "vm0.raw", "ab") as file:
        file.write(bytes(512))
    saved, copy = tmp_path / "saved", tmp_path / "copy"
    assert oldmem("save", "--machine", folder, "-o", saved).status == 0
    done = run(folder, "dd", "if=/proc/vmcore", f"of={copy}", "bs=1M", "status=none")
    assert (done.returncode, done.stderr) == (0, "")
    assert filecmp.cmp(saved, copy, shallow=False)


def test_plan_of_another_build_is_told_and_leaves_programs_to_themselves(tmp_path: Path) -> None:
    other = tmp_path / "plan"
    other.write_bytes(bytes(1 << 16))
    for path, said in ((other, f"oldmem run: {other}: not what this library was built for\n"), (tmp_path / "none", "")):
        environment = os.environ | {"LD_PRELOAD": LIBRARY, PLAN_VARIABLE: str(path)}
        done = subprocess.run(["cat", "/etc/hostname"], env=environment, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (0, Path("/etc/hostname").read_text())
        assert done.stderr == said
