# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read under ``oldmem run``, and how: everybody, in every way, and gets the bytes of the saved file. Programs
with our library in front of libc are fast; static ones, descriptors that are inherited or opened anew, and what the
kernel copies are right all the same. docs/readers.md has the table of who was tried."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.conftest import Recorded
from tests.image.machines import DEVICE, copied, device_load

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")

SOURCE = Path(__file__).with_name("reader.c")
WAYS = (
    *("reading", "stdio", "reopening", "passing", "copying", "uring", "folder", "mistake", "moving"),
    *("forking", "signals", "user"),
)
HUNG = 180  # seconds; the slowest way takes three


@pytest.fixture(scope="session")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """reader.c with libc as a library, which takes ours, and with libc in it, which does not."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    folder = tmp_path_factory.mktemp("readers")
    flags = ("-O1", "-Wall", "-Wextra", "-Werror", "-pthread")
    for name, more in (("dynamic", []), ("static", ["-static"])):
        subprocess.run(["gcc", *flags, *more, "-o", folder / name, SOURCE], check=True, timeout=60)
    return {name: folder / name for name in ("dynamic", "static")}


def line_of(machine: Recorded, vmcore: Path | str, *command: Path | str) -> list[Path | str]:
    options = ("--machine", machine.folder, "--layout", "kernel", "--vmcore", vmcore)
    return [sys.executable, "-m", "capture", "run", *options, "--", *command]


def run(machine: Recorded, vmcore: Path | str, *command: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line_of(machine, vmcore, *command), capture_output=True, text=True, timeout=HUNG, check=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", ["dynamic", "dynamic, no file of that name", "static"])
def test_reader_gets_the_saved_bytes(
    readers: dict[str, Path], small_machine: Recorded, saved_small: Path, tmp_path: Path, program: str, way: str
) -> None:
    vmcore = tmp_path / "vmcore"
    if "no file" not in program:
        vmcore.write_text("not this")
    done = run(small_machine, vmcore, readers[program.split(",", maxsplit=1)[0]], way, vmcore, saved_small)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not vmcore.exists() or vmcore.read_text() == "not this"


def filled(machine: Recorded, folder: Path) -> Path:
    """A copy of the machine whose device has something else in each page."""
    copied(machine.folder, folder)
    with open(folder / "vm0.raw", "r+b") as file:
        for page in range(64 << 20 >> 12):
            if file.seek(page << 12) >= 0 and not any(file.read(4096)):
                file.seek(page << 12)
                file.write(struct.pack("<Q", 1 << 60 | page) * 512)
    return folder


def test_pieces_of_one_read_lie_together_whoever_shares_the_descriptor(
    small_machine: Recorded, saved_small: Path, tmp_path: Path
) -> None:
    script = (
        "import os, struct, sys\n"
        "fd, start = os.open('/proc/vmcore', os.O_RDONLY), int(sys.argv[1])\n"
        "os.lseek(fd, start, os.SEEK_SET)\n"
        "children = []\n"
        "for _ in range(4):\n"
        "    if child := os.fork():\n"
        "        children.append(child)\n"
        "        continue\n"
        "    a, b, wrong = bytearray(3 * 4096), bytearray(5 * 4096), 0\n"
        "    while os.readv(fd, [a, b]) == 8 * 4096:\n"
        "        tags = struct.unpack('<' + 'Q4088x' * 8, a + b)\n"
        "        wrong += len({tag - i for i, tag in enumerate(tags) if tag >> 60 == 1}) > 1\n"
        "    os._exit(wrong > 0)\n"
        "sys.exit(any([os.waitpid(child, 0)[1] for child in children]))\n"
    )
    folder = filled(small_machine, tmp_path / "machine")
    machine = Recorded(folder, small_machine.pages, small_machine.desc)
    device = device_load(saved_small)
    done = run(machine, "/proc/vmcore", sys.executable, "-c", script, str(device.offset))
    assert (done.returncode, done.stderr) == (0, "")


def test_mapping_of_refused_pages_does_not_grow_zeros(
    small_machine: Recorded, saved_small: Path, tmp_path: Path
) -> None:
    script = (
        "import ctypes, os, sys\n"
        "libc, at = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])\n"
        "libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p\n"
        "fd, flags = os.open('/proc/vmcore', os.O_RDONLY), (1, 1)\n"  # PROT_READ, MAP_SHARED
        "for offset in (0, at):\n"
        "    map = libc.mmap(None, ctypes.c_size_t(4096), *flags, fd, ctypes.c_long(offset))\n"
        "    sizes = ctypes.c_size_t(4096), ctypes.c_size_t(8192)\n"
        "    grown = libc.mremap(ctypes.c_void_p(map), *sizes, 1)\n"
        "    if grown != ctypes.c_void_p(-1).value:\n"
        "        assert ctypes.string_at(grown, 8192) == os.pread(fd, 8192, offset), offset\n"
    )
    folder = filled(small_machine, tmp_path / "machine")
    device = device_load(saved_small)
    deny = f"{DEVICE[0] + (3 << 20):x}-{DEVICE[0] + (3 << 20) + 4095:x}"
    line: list[Path | str] = [sys.executable, "-m", "capture", "run", "--machine", folder, "--layout", "kernel"]
    line += ["--deny", deny, "--", sys.executable, "-c", script, str(device.offset + (3 << 20))]
    done = subprocess.run(line, capture_output=True, text=True, timeout=HUNG, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_outlives_the_command_gets_no_zeros(small_machine: Recorded, saved_small: Path, tmp_path: Path) -> None:
    script = (
        "import mmap, os, sys, time\n"
        "fd, at, out = os.open('/proc/vmcore', os.O_RDONLY), int(sys.argv[1]), sys.argv[2]\n"
        "whole = mmap.mmap(fd, 4 << 20, mmap.MAP_SHARED, mmap.PROT_READ, offset=at)\n"
        "if os.fork():\n"
        "    assert whole[:8]\n"
        "    os._exit(0)\n"
        "while not os.path.exists(out + '.cut'):\n"
        "    time.sleep(0.01)\n"
        "if child := os.fork():\n"
        "    with open(out + '.new', 'w') as file:\n"
        "        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))\n"
        "    os.rename(out + '.new', out)\n"
        "else:\n"
        "    os._exit(whole[3 << 20] == 0)\n"
    )
    folder = filled(small_machine, tmp_path / "machine")
    machine, out = Recorded(folder, small_machine.pages, small_machine.desc), tmp_path / "out"
    device = device_load(saved_small)
    line = line_of(machine, "/proc/vmcore", sys.executable, "-c", script, str(device.offset), out)
    with open(tmp_path / "said", "wb") as said:
        assert subprocess.run(line, stdout=said, stderr=said, timeout=HUNG, check=False).returncode == 0
    os.truncate(folder / "vm0.raw", 0)
    (tmp_path / "out.cut").touch()
    end = time.monotonic() + HUNG
    while not out.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert out.read_text() == str(-signal.SIGBUS)


def test_name_without_a_file_never_leads_to_another_file(small_machine: Recorded, tmp_path: Path) -> None:
    """In another pid namespace the number of the process that has the vmcore is some other process's."""
    script = (
        "import ctypes, os, signal\n"
        "libc, name, oldmem = ctypes.CDLL(None), '/proc/vmcore', os.getppid()\n"
        "with open(name, 'rb') as file:\n"
        "    assert file.read(4) == b'\\x7fELF'\n"
        "assert libc.unshare(0x20000000 | 0x00020000) == 0\n"  # CLONE_NEWPID, CLONE_NEWNS
        "if child := os.fork():\n"
        "    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "assert libc.mount(b'none', b'/', None, 16384 | 1 << 18, None) == 0\n"  # MS_REC, MS_PRIVATE
        "assert libc.mount(b'proc', b'/proc', b'proc', 0, None) == 0\n"
        "with open('/proc/sys/kernel/ns_last_pid', 'w') as file:\n"
        "    file.write(str(oldmem - 1))\n"
        "hear, tell = os.pipe()\n"
        "if not os.fork():\n"  # the first process of the namespace ends it
        "    other = os.open('/dev/zero', os.O_RDONLY)\n"
        "    for fd in set(range(3, 300)) - {other, hear, tell}:\n"
        "        os.dup2(other, fd)\n"
        "    os.write(tell, b'!')\n"
        "    signal.pause()\n"
        "os.read(hear, 1)\n"
        "assert os.path.exists(f'/proc/{oldmem}')\n"
        "for look in (os.stat, open, lambda name: os.open(name, os.O_RDONLY)):\n"
        "    try:\n"
        "        look(name)\n"
        "    except FileNotFoundError:\n"
        "        continue\n"
        "    os._exit(1)\n"
        "os._exit(0)\n"
    )
    if os.path.exists("/proc/vmcore"):
        pytest.skip("there is a file of that name")
    done = run(small_machine, "/proc/vmcore", sys.executable, "-c", script)
    assert (done.returncode, done.stderr) == (0, "")


PROGRAMS = {
    "cat of standard input by name": "cat /dev/stdin <{0}",
    "cp of a descriptor": "cp /dev/fd/7 {1} 7<{0}; cat {1}",
    "dd of a descriptor": "exec 7<{0}; dd bs=1M status=none <&7",
    "head": "head -c 1G {0}",
    "busybox cat": "busybox cat {0}",
    "busybox dd": "busybox dd if={0} bs=64k 2>/dev/null",
    "busybox cat of standard input": "busybox cat <{0}",
    "zstd": "zstd -q -1 <{0} | zstd -dq",
    "zstd of a name": "zstd -q -1 -c {0} | zstd -dq",
    "gzip": "gzip -1 <{0} | gzip -d",
    "xz": "xz -0 <{0} | xz -d",
    "tar": "tar -C $(dirname {0}) -cf - vmcore | tar -xOf -",
    "cp --sparse=always": "cp --sparse=always {0} {1}; cat {1}",
    "cp --reflink=auto": "cp --reflink=auto {0} {1}; cat {1}",
    "install": "install -m 600 {0} {1}; cat {1}",
    "perl": "perl -pe '' {0}",
    "python's shutil": "python3 -c 'import shutil, sys; shutil.copyfile(*sys.argv[1:])' {0} {1}; cat {1}",
    "rsync": "rsync --whole-file {0} {1}; cat {1}",
    "curl": "curl -s file://{0}",
    "split": "split -b 64M {0} {1}. && cat {1}.*",
    "test -r": "[ -r {0} ] && [ -f {0} ] && [ -s {0} ] && cat {0}",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_common_program_gives_the_saved_bytes(
    small_machine: Recorded, saved_small: Path, tmp_path: Path, name: str
) -> None:
    command = PROGRAMS[name].format(tmp_path / "vmcore", tmp_path / "copy")
    needed = command.split()[0]
    if needed.isalnum() and needed != "exec" and not shutil.which(needed):
        pytest.skip(f"{needed} is not installed")
    (tmp_path / "vmcore").write_text("not this")
    compare = f"set -o pipefail; {{ {command}; }} | cmp - {saved_small}"
    done = run(small_machine, tmp_path / "vmcore", "bash", "-c", compare)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_streams_of_cxx_read_all_of_it(small_machine: Recorded, saved_small: Path, tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    source = tmp_path / "stream.cc"
    source.write_text(
        "#include <fstream>\n#include <iostream>\n#include <filesystem>\n"
        "int main(int, char **argv) {\n"
        "    std::ifstream in(argv[1], std::ios::binary);\n"
        "    if (!std::filesystem::file_size(argv[1]) || !in) return 1;\n"
        "    std::cout << in.rdbuf() << std::flush;\n"
        "    return !std::cout;\n"
        "}\n"
    )
    subprocess.run(["g++", "-O1", "-std=c++17", "-o", tmp_path / "stream", source], check=True, timeout=120)
    for vmcore in ("/proc/vmcore", tmp_path / "there"):
        (tmp_path / "there").write_text("not this")
        compare = f"set -o pipefail; {tmp_path / 'stream'} {vmcore} | cmp - {saved_small}"
        done = run(small_machine, vmcore, "bash", "-c", compare)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(number) for number in file.read().split()]


def _servers(pid: int) -> Iterator[int]:
    """The processes that serve for the oldmem of that process id."""
    for child in _children(pid):
        with contextlib.suppress(OSError):
            if b"capture\0run" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield child
                yield from _children(child)


def _ends(pid: int) -> bool:
    end = time.monotonic() + HUNG
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.01)
    return not os.path.exists(f"/proc/{pid}")


# what else ends "oldmem run" is passed on to the command
ENDED = [
    *((victim, sent) for victim in ("server", "standby") for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
    ("oldmem run", signal.SIGKILL),
]


@pytest.mark.parametrize(("victim", "sent"), ENDED)
def test_reader_goes_on_whichever_process_of_ours_is_ended(
    readers: dict[str, Path],
    small_machine: Recorded,
    saved_small: Path,
    tmp_path: Path,
    victim: str,
    sent: signal.Signals,
) -> None:
    vmcore = tmp_path / "vmcore"
    vmcore.write_text("not this")
    go = tmp_path / "go"
    os.mkfifo(go)
    wait = f"echo up; read line <{go}; exec {readers['static']} reading {vmcore} {saved_small}"
    line = line_of(small_machine, vmcore, "bash", "-c", wait)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        hung = threading.Timer(HUNG, process.kill)
        hung.start()
        try:
            assert process.stdout
            assert process.stdout.readline() == "up\n"
            served = list(_servers(process.pid))
            assert len(served) == 2
            os.kill({"server": served[0], "standby": served[1]}.get(victim, process.pid), sent)
            go.write_text("go\n")
            out, err = process.communicate()
            assert (out, err) == ("", "")
            assert process.returncode == (-sent if victim == "oldmem run" else 0)
            assert all(_ends(pid) for pid in served), "a server outlives the command and its mounts"
        finally:
            hung.cancel()
            process.kill()
    assert str(vmcore) not in Path("/proc/self/mountinfo").read_text()
