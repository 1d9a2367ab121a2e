# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read under ``oldmem run``, and how: everybody, in every way, and gets the bytes of the saved file. Programs
with our library in front of libc are fast; static ones, descriptors that are inherited or opened anew, and what the
kernel copies are right all the same. docs/readers.md has the table of who was tried."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.conftest import Recorded

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


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
@pytest.mark.parametrize("victim", ["server", "standby", "oldmem run"])
def test_reader_goes_on_whichever_process_of_ours_is_ended(
    readers: dict[str, Path],
    small_machine: Recorded,
    saved_small: Path,
    tmp_path: Path,
    victim: str,
    sent: signal.Signals,
) -> None:
    if victim == "oldmem run" and sent != signal.SIGKILL:
        pytest.skip("what ends the command is passed on to it")
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
