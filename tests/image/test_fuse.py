# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vmcore as a mounted file system: every byte as `save` writes it, every way to end it, nothing left behind.

Whatever touches a mount does so in a child that can be killed: no test hangs with a server that does not answer."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.image.conftest import Recorded
from tests.image.machines import BLOCK, PAGE, oldmem, phdrs_of
from tests.pace import patience, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")


def mounts_on(target: Path) -> list[str]:
    """major:minor of the mounts on *target*, by the kernel's list; the mount itself is not touched."""
    with open("/proc/self/mountinfo", "rb") as file:
        lines = [line.split() for line in file]
    return [
        fields[2].decode()
        for fields in lines
        if fields[4].decode("unicode_escape").encode("latin-1") == os.fsencode(target)
    ]


def processes_of(target: Path) -> dict[int, int]:
    """Process ids of the servers and standbys started for *target*, with their parents'."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                status = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if os.fsencode(target) in words and status[0] != "Z":
                    found[int(name)] = int(status[1])
    return found


def server_and_standby(target: Path) -> tuple[int, int]:
    """Once both are there; the standby is the other one's child."""
    pairs: list[tuple[int, int]] = []

    def found() -> bool:
        processes = processes_of(target)
        pairs[:] = [(parent, pid) for pid, parent in processes.items() if parent in processes]
        return len(processes) == 2 and len(pairs) == 1

    wait_until("server and standby", found, 30.0)
    return pairs[0]


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def wait_until_gone(target: Path) -> None:
    wait_until("mount gone", lambda: not mounts_on(target))
    wait_until("processes gone", lambda: not processes_of(target))


def ask(code: str, *arguments: str | Path | int, timeout: float = 60.0) -> str:
    """Run *code* in another interpreter; its standard output. sys.argv has the arguments from 1 on."""
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys\n" + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=patience(timeout),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SAME = """
with open(sys.argv[1], "rb", buffering=0) as a, open(sys.argv[2], "rb", buffering=0) as b:
    while (x := a.read(1 << 20)) == (y := b.read(1 << 20)) and x:
        pass
    print(x == y)
"""


def same(a: Path, b: Path) -> bool:
    """As cmp says, which would ask for 4 KiB at a time."""
    return ask(SAME, a, b) == "True\n"


class Mounts:
    """Mounts things and takes them away again, whatever happened."""

    def __init__(self, machine: Path) -> None:
        self.machine = machine
        self.targets: list[Path] = []

    def mount(self, target: Path, *more: str) -> Path:
        self.targets.append(target)
        result = oldmem("mount", "--layout", "kernel", "--machine", self.machine, target, *more)
        assert (result.status, result.lines) == (0, [])
        assert mounts_on(target)
        return target

    def clean(self) -> None:
        for target in self.targets:
            for _ in mounts_on(target):
                subprocess.run(["umount", "-l", target], timeout=20, stderr=subprocess.DEVNULL)
            for pid in processes_of(target):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def mounts(small_machine: Recorded) -> Iterator[Mounts]:
    made = Mounts(small_machine.folder)
    yield made
    made.clean()
    assert not [t for t in made.targets if mounts_on(t)]


@pytest.fixture
def folder(mounts: Mounts, tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return mounts.mount(tmp_path / "mnt")


def test_folder_has_the_vmcore_twice_and_reports(folder: Path, saved_small: Path) -> None:
    assert ask("print(sorted(os.listdir(sys.argv[1])))", folder) == (
        "['guard.json', 'map.json', 'vmcore', 'vmcore.direct']\n"
    )
    listing = subprocess.run(["ls", "-la", folder], capture_output=True, text=True, timeout=20, check=True)
    assert listing.stderr == ""
    sizes = ask(
        "for n in sys.argv[2:]: print(os.stat(f'{sys.argv[1]}/{n}').st_size)", folder, "vmcore", "vmcore.direct"
    )
    assert sizes.split() == [str(saved_small.stat().st_size)] * 2
    modes = ask(
        "print(*(oct(os.stat(p).st_mode) for p in sys.argv[1:]))", folder, folder / "vmcore", folder / "map.json"
    )
    assert modes.split() == ["0o40500", "0o100400", "0o100400"]
    space = ask(
        "s = os.statvfs(sys.argv[1]); print(s.f_blocks * s.f_frsize, s.f_bfree, s.f_flag & os.ST_RDONLY)", folder
    )
    assert space.split() == [str(saved_small.stat().st_size), "0", "1"]
    assert ask("print(os.path.exists(sys.argv[1] + '/nothing'))", folder) == "False\n"


@pytest.mark.parametrize("name", ["vmcore", "vmcore.direct"])
def test_every_byte_is_as_saved(name: str, folder: Path, saved_small: Path, tmp_path: Path) -> None:
    assert same(folder / name, saved_small)
    for command in (
        ["dd", f"if={folder / name}", f"of={tmp_path / 'dd'}", "bs=1M", "conv=sparse"],
        ["cp", str(folder / name), str(tmp_path / "cp")],
    ):
        subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert same(tmp_path / "dd", saved_small)
    assert same(tmp_path / "cp", saved_small)


@pytest.mark.parametrize("more", [[], ["--direct"]])
def test_file_is_mounted_over(more: list[str], mounts: Mounts, tmp_path: Path, saved_small: Path) -> None:
    target = tmp_path / "vmcore"
    target.write_bytes(b"what was there before")
    mounts.mount(target, *more)
    assert same(target, saved_small)
    subprocess.run(["umount", target], check=True, timeout=20)
    wait_until_gone(target)
    assert target.read_bytes() == b"what was there before"


MMAP = """
import mmap
path, reference, flags = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(path, "rb") as a, open(reference, "rb") as b:
    try:
        x = mmap.mmap(a.fileno(), 0, flags, mmap.PROT_READ)
    except OSError as e:
        print(e.errno)
        sys.exit()
    y = mmap.mmap(b.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    size = os.fstat(b.fileno()).st_size
    same = all(x[at : at + (8 << 20)] == y[at : at + (8 << 20)] for at in range(0, size, 8 << 20))
    print("same" if same and len(x) == size else "different")
"""


@pytest.mark.parametrize("name", ["vmcore", "vmcore.direct"])
@pytest.mark.parametrize("flags", [1, 2], ids=["shared", "private"])
def test_mapping_shows_the_same_bytes(name: str, flags: int, folder: Path, saved_small: Path) -> None:
    answer = ask(MMAP, folder / name, saved_small, flags).strip()
    release = tuple(int(n) for n in os.uname().release.split("-")[0].split(".")[:2])
    if name == "vmcore.direct" and flags == 1 and release < (6, 6):
        assert answer in ("19", "same"), "ENODEV before FUSE_DIRECT_IO_ALLOW_MMAP"
    else:
        assert answer == "same"


READS = """
import random
rng = random.Random(int(sys.argv[3]))
a, b = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_RDONLY)
size = os.fstat(b).st_size
for _ in range(int(sys.argv[4])):
    at = rng.choice((rng.randrange(size), rng.randrange(0x40000), size - rng.randrange(5000)))
    n = rng.choice((1, 7, 511, 4096, 4097, rng.randrange(3 << 20)))
    assert os.pread(a, n, at) == os.pread(b, n, at), (at, n)
for at, n in ((size, 1), (size + 1, 4096), (size + (1 << 40), 10), (size - 1, 10), (size - 4096, 8192), (0, 0)):
    assert os.pread(a, n, at) == os.pread(b, n, at), (at, n)
print("same")
"""


@pytest.mark.parametrize("name", ["vmcore", "vmcore.direct"])
def test_small_unaligned_reads_and_reads_at_the_end(name: str, folder: Path, saved_small: Path) -> None:
    assert ask(READS, folder / name, saved_small, 1, 300) == "same\n"


def test_many_readers_at_once(folder: Path, saved_small: Path) -> None:
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", "import os, sys\n" + READS, folder / name, saved_small, str(seed), "60"],
            stdout=subprocess.PIPE,
        )
        for seed, name in enumerate(["vmcore", "vmcore.direct"] * 4)
    ]
    try:
        assert [reader.communicate(timeout=60)[0] for reader in readers] == [b"same\n"] * 8
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


BUSY_READER = """
fd = os.open(sys.argv[1], os.O_RDONLY)
print("reading", flush=True)
while True:
    os.pread(fd, 64 << 20, 0)
"""


def busy_reader(path: Path) -> subprocess.Popen[bytes]:
    reader = subprocess.Popen(
        [sys.executable, "-c", "import os, sys\n" + BUSY_READER, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"reading\n"
    return reader


@pytest.mark.parametrize("name", ["vmcore", "vmcore.direct"])
def test_reader_that_is_killed_in_the_middle_leaves_the_server_serving(
    name: str, folder: Path, saved_small: Path
) -> None:
    rng = random.Random(3)
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM) * 3:
        reader = busy_reader(folder / name)
        time.sleep(rng.uniform(0, 0.05))
        reader.send_signal(number)
        assert reader.wait(timeout=20) != 0
    assert same(folder / name, saved_small)


REFUSED = """
import errno
target = sys.argv[1]
def attempt(what, action):
    try:
        action()
    except OSError as e:
        print(what, errno.errorcode[e.errno])
    else:
        print(what, "done")
for name in ("vmcore", "vmcore.direct", "map.json"):
    path = f"{target}/{name}"
    attempt("rdwr", lambda: os.open(path, os.O_RDWR))
    attempt("wronly", lambda: os.open(path, os.O_WRONLY))
    attempt("trunc", lambda: os.open(path, os.O_RDONLY | os.O_TRUNC))
    attempt("truncate", lambda: os.truncate(path, 0))
    attempt("unlink", lambda: os.unlink(path))
    attempt("chmod", lambda: os.chmod(path, 0o777))
    attempt("rename", lambda: os.rename(path, path + "x"))
    attempt("utime", lambda: os.utime(path))
    attempt("link", lambda: os.link(path, path + "y"))
attempt("create", lambda: os.open(target + "/new", os.O_CREAT | os.O_WRONLY))
attempt("mkdir", lambda: os.mkdir(target + "/new"))
attempt("symlink", lambda: os.symlink("x", target + "/new"))
attempt("mknod", lambda: os.mknod(target + "/new"))
attempt("rmdir", lambda: os.rmdir(target + "/vmcore"))
"""


def test_every_kind_of_write_is_refused(folder: Path, saved_small: Path) -> None:
    told = [line.split() for line in ask(REFUSED, folder).splitlines()]
    assert len(told) == 32
    assert {verdict for what, verdict in told if what != "rmdir"} == {"EROFS"}
    assert told[-1][1] in ("EROFS", "ENOTDIR")
    assert same(folder / "vmcore", saved_small)


def test_file_mounted_over_refuses_writing(mounts: Mounts, tmp_path: Path) -> None:
    target = tmp_path / "vmcore"
    target.write_bytes(b"x")
    mounts.mount(target)
    code = "try: os.open(sys.argv[1], os.O_RDWR)\nexcept OSError as e: print(e.strerror)"
    assert ask(code, target) == "Read-only file system\n"


READ_JSON = "import json; print(json.dumps(json.load(open(sys.argv[1]))))"


def test_reports_are_json_and_as_the_command_tells_them(folder: Path, small_machine: Recorded) -> None:
    told = oldmem("map", "--json", "--layout", "kernel", "--machine", small_machine.folder)
    assert json.loads(ask(READ_JSON, folder / "map.json")) == json.loads(told.out)


def test_report_of_the_guard_is_fresh_at_each_opening(folder: Path, saved_small: Path) -> None:
    def rule() -> dict[str, int]:
        guard = json.loads(ask(READ_JSON, folder / "guard.json"))
        (found,) = [r for r in guard["rules"] if r["name"].startswith("virtio-mem")]
        return {**found, "bytes_read": guard["bytes_read"], "bytes_refused": guard["bytes_refused"]}

    with saved_small.open("rb") as stream:
        device = next(p for p in phdrs_of(stream.read(1 << 20)) if p.paddr == 0x400000000)
    before = rule()
    assert before["refused_bytes"] == 12 * BLOCK
    code = "os.pread(os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2]), int(sys.argv[3]))"
    unplugged = device.offset + 16 * BLOCK
    ask(code, folder / "vmcore.direct", 3 * PAGE, unplugged)
    after = rule()
    assert after["page_reads_refused"] - before["page_reads_refused"] == 3
    assert after["bytes_refused"] - before["bytes_refused"] == 3 * PAGE
    ask(code, folder / "vmcore.direct", 2 * PAGE, device.offset)
    assert rule()["bytes_read"] - after["bytes_read"] == 2 * PAGE


def test_report_that_is_read_while_another_opens_it_is_whole(folder: Path) -> None:
    code = (
        "import json\n"
        "a = open(sys.argv[1], 'rb'); first = a.read(10)\n"
        "b = open(sys.argv[1], 'rb'); b.read()\n"
        "json.loads(first + a.read())\n"
        "print('whole')"
    )
    assert ask(code, folder / "guard.json") == "whole\n"


def test_read_ahead_is_1_mib(folder: Path) -> None:
    (device,) = mounts_on(folder)
    path = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    if not path.exists():
        pytest.skip("sysfs has no bdi of it")
    assert path.read_text() == "1024\n"


def test_umount_ends_server_and_standby(folder: Path) -> None:
    assert len(processes_of(folder)) == 2
    subprocess.run(["umount", folder], check=True, timeout=20)
    wait_until_gone(folder)


def test_umount_of_a_busy_mount_is_refused_and_a_lazy_one_ends_with_its_last_reader(folder: Path) -> None:
    reader = busy_reader(folder / "vmcore.direct")
    try:
        assert subprocess.run(["umount", folder], timeout=20, stderr=subprocess.DEVNULL).returncode != 0
        subprocess.run(["umount", "-l", folder], check=True, timeout=20)
        time.sleep(0.2)
        assert reader.poll() is None
        assert len(processes_of(folder)) == 2
    finally:
        reader.kill()
        reader.wait()
    wait_until_gone(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("whom", [0, 1], ids=["server", "standby"])
def test_one_process_that_ends_is_replaced_and_the_mount_goes_on(
    whom: int, number: signal.Signals, folder: Path, saved_small: Path
) -> None:
    for _ in range(2):
        pair = server_and_standby(folder)
        os.kill(pair[whom], number)
        wait_until("it has ended", partial(is_gone, pair[whom]))
        assert same(folder / "vmcore.direct", saved_small)
        assert pair[1 - whom] in server_and_standby(folder)
    assert mounts_on(folder)


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_to_both_unmounts_and_ends_them_even_while_a_reader_keeps_the_server_busy(
    busy: bool, folder: Path
) -> None:
    reader = busy_reader(folder / "vmcore.direct") if busy else None
    try:
        for pid in server_and_standby(folder):
            os.kill(pid, signal.SIGTERM)
        wait_until_gone(folder)
    finally:
        if reader:
            reader.kill()
            reader.wait(timeout=20)


LAST_MIB = """
with open(sys.argv[1], "rb", buffering=0) as a, open(sys.argv[2], "rb") as b:
    for file in (a, b):
        file.seek(-(1 << 20), os.SEEK_END)
    print(a.read() == b.read())
"""


def test_request_that_a_killed_server_was_at_is_answered_by_its_standby(
    folder: Path, mounts: Mounts, tmp_path: Path
) -> None:
    """The memory of this machine lies in a vmcore that another server serves: while that one is stopped, no request is
    answered there."""
    machine, target, reference = tmp_path / "machine", tmp_path / "upper", tmp_path / "saved"
    (machine / "root/proc").mkdir(parents=True)
    (machine / "root/proc/iomem").write_text("00001000-0009fbff : System RAM\n01000000-017fffff : System RAM\n")
    ram = {"image": str(folder / "vmcore.direct"), "offset": 1 << 20, "paddr": 0, "size": 32 << 20}
    (machine / "machine.json").write_text(json.dumps({"format": 1, "arch": "x86_64", "ram": [ram], "virtio_mem": []}))
    target.mkdir()
    mounts.targets.append(target)
    assert oldmem("save", "-q", "--machine", machine, "-o", reference).status in (0, 4)
    assert oldmem("mount", "-q", "--machine", machine, target).status in (0, 4)
    server, standby = server_and_standby(target)
    lower = server_and_standby(folder)

    def doing() -> str:
        return Path(f"/proc/{server}/syscall").read_text().split()[0]

    idle = doing()
    for pid in lower:
        os.kill(pid, signal.SIGSTOP)
    command = [sys.executable, "-c", "import os, sys\n" + LAST_MIB, str(target / "vmcore.direct"), str(reference)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        wait_until("request in flight", lambda: doing() not in (idle, "running"), 30.0)
        os.kill(server, signal.SIGKILL)
        wait_until("dead", lambda: server not in processes_of(target))
    finally:
        for pid in lower:
            os.kill(pid, signal.SIGCONT)
    try:
        assert reader.communicate(timeout=30)[0] == b"True\n"
    finally:
        reader.kill()
        reader.wait()
    assert server_and_standby(target)[0] == standby


SERVE = """
import signal
from capture.dump import build
from capture.fuse import FuseServer
from capture.image_machine import ImageMachine
from capture.recorded import load
from capture.service import Service

def deadly():
    os.kill(os.getpid(), signal.SIGKILL)

def failing(calls=[]):
    calls.append(0)
    if len(calls) > 1:
        raise MemoryError
    return b"the first"

machine, target = sys.argv[1:]
texts = {"deadly": deadly, "failing": failing, "fine": lambda: os.urandom(1 << 16)}
server = FuseServer(build(ImageMachine(load(machine)), "kernel").vmcore, target, texts)
with Service(server, [server.target]) as service:
    server.mount()
    service.mounted()
    service.wait_until_served()
    service.commit()
"""


@pytest.fixture
def with_texts(mounts: Mounts, tmp_path: Path) -> Path:
    """A mount with reports that kill their servers, that fail the second time, that are never the same again."""
    target = tmp_path / "mnt"
    target.mkdir()
    mounts.targets.append(target)
    ask(SERVE, mounts.machine, target)
    return target


def test_report_that_kills_its_servers_is_an_error_to_its_reader_alone(with_texts: Path, saved_small: Path) -> None:
    """As one that takes more memory than there is: after some tries nobody makes it any more."""
    first, _ = server_and_standby(with_texts)
    code = "try: open(sys.argv[1])\nexcept OSError as e: print(e.strerror)"
    assert ask(code, with_texts / "deadly") == "Input/output error\n"
    assert same(with_texts / "vmcore", saved_small)
    assert first not in server_and_standby(with_texts)
    assert ask("print(len(open(sys.argv[1], 'rb').read()))", with_texts / "fine") == "65536\n"


def test_report_that_lacks_memory_stays_as_it_was(with_texts: Path) -> None:
    for _ in range(3):
        assert ask("print(open(sys.argv[1]).read())", with_texts / "failing") == "the first\n"


HALF_AND_HALF = """
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)  # nothing comes from the page cache
half = os.pread(fd, 1 << 15, 0)
print("half", flush=True)
sys.stdin.readline()
print(os.pread(fd, 1 << 15, 0) == half, len(half), len(os.pread(fd, 1 << 16, 1 << 15)))
"""


def test_report_that_is_half_read_when_its_server_is_killed_is_whole(with_texts: Path) -> None:
    command = [sys.executable, "-c", "import os, sys\n" + HALF_AND_HALF, str(with_texts / "fine")]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    try:
        assert reader.stdout.readline() == "half\n"
        server, _ = server_and_standby(with_texts)
        os.kill(server, signal.SIGKILL)
        assert reader.communicate("\n", timeout=30)[0] == "True 32768 32768\n"
    finally:
        reader.kill()
        reader.wait()


def test_counters_and_reports_go_on_after_a_kill(folder: Path, saved_small: Path) -> None:
    def told() -> tuple[int, int, list[str]]:
        guard = json.loads(ask(READ_JSON, folder / "guard.json"))
        return guard["bytes_read"], guard["bytes_refused"], guard["late_dumps"]

    assert same(folder / "vmcore.direct", saved_small)
    before = told()
    assert before[1]
    for _ in range(2):
        os.kill(server_and_standby(folder)[0], signal.SIGKILL)
        assert told() == before
    assert same(folder / "vmcore.direct", saved_small)
    assert told()[1] == 2 * before[1]


def test_io_uring_reads_end_where_the_file_does(folder: Path, saved_small: Path, tmp_path: Path) -> None:
    source = Path(__file__).with_name("uring.c")
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "uring", source], check=True, timeout=60)
    size = saved_small.stat().st_size
    places = (0, 1 << 20), (1, 7), (size - 40960, 131072), (size - 5, 100), (size - (2 << 20), 4 << 20)
    for name in ("vmcore", "vmcore.direct"):
        for offset, asked in places:
            command = [str(tmp_path / "uring"), str(folder / name), str(offset), str(asked)]
            done = subprocess.run(command, capture_output=True, timeout=30)
            if done.returncode == 77:
                pytest.skip("this kernel gives no io_uring")
            with saved_small.open("rb") as file:
                file.seek(offset)
                assert done.stdout == file.read(asked), (name, offset)


@pytest.fixture
def foreground(mounts: Mounts, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A server in the foreground that has served, and where it is mounted."""
    target = tmp_path / "mnt"
    target.mkdir()
    mounts.targets.append(target)
    server = subprocess.Popen(
        [sys.executable, "-m", "capture", "mount", "--foreground", "--machine", mounts.machine, target],
        stderr=subprocess.PIPE,
    )
    try:
        wait_until("mounted", lambda: mounts_on(target))
        assert ask("print(open(sys.argv[1], 'rb').read(4))", target / "vmcore") == "b'\\x7fELF'\n"
        yield server, target
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_foreground_server_ends_cleanly_by_signals_even_several(
    number: signal.Signals, foreground: tuple[subprocess.Popen[bytes], Path]
) -> None:
    server, target = foreground
    server.send_signal(number)
    with contextlib.suppress(ProcessLookupError):
        server.send_signal(number)
    assert server.communicate(timeout=20)[1] == b""
    assert server.returncode == 0
    assert not mounts_on(target)


def test_foreground_server_ends_by_umount(foreground: tuple[subprocess.Popen[bytes], Path]) -> None:
    server, target = foreground
    subprocess.run(["umount", target], check=True, timeout=20)
    assert server.communicate(timeout=20)[1] == b""
    assert server.returncode == 0


def test_two_mounts_at_once_do_not_know_of_each_other(mounts: Mounts, tmp_path: Path, saved_small: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for target in (a, b):
        target.mkdir()
        mounts.mount(target)
    assert mounts_on(a) != mounts_on(b)
    subprocess.run(["umount", a], check=True, timeout=20)
    wait_until_gone(a)
    assert same(b / "vmcore", saved_small)


def test_mount_on_a_foreign_mount_is_undone_without_the_one_below(
    mounts: Mounts, tmp_path: Path, saved_small: Path
) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target], check=True, timeout=20)
    mounts.targets.append(target)
    below = mounts_on(target)
    mounts.mount(target)
    assert len(mounts_on(target)) == 2
    assert same(target / "vmcore", saved_small)
    for pid in server_and_standby(target):
        os.kill(pid, signal.SIGTERM)
    wait_until("processes gone", lambda: not processes_of(target))
    assert mounts_on(target) == below


@pytest.mark.parametrize("shape", ["folder", "file"])
def test_second_server_on_a_target_is_refused_while_the_first_one_lives(
    shape: str, mounts: Mounts, tmp_path: Path, saved_small: Path
) -> None:
    target = tmp_path / "mnt"
    if shape == "file":
        target.write_bytes(b"")
    else:
        target.mkdir()
    mounts.mount(target)
    server_and_standby(target)
    result = oldmem("mount", "--machine", mounts.machine, target)
    assert result.status == 1
    assert result.lines == [
        f"oldmem: {target} is served already, by another oldmem that is alive: end that first, by oldmem done or "
        f"umount -l {target}"
    ]
    assert len(mounts_on(target)) == 1
    assert len(processes_of(target)) == 2
    assert same(target / "vmcore" if shape == "folder" else target, saved_small)


@pytest.mark.parametrize("name", ["with blank", "wïth ümläut", "back\\slash", "link"])
def test_any_name_will_do_for_a_target(name: str, mounts: Mounts, tmp_path: Path) -> None:
    target = tmp_path / name
    if name == "link":
        (tmp_path / "real").mkdir()
        target.symlink_to("real")
    else:
        target.mkdir()
    mounts.targets.append(target)
    result = oldmem("mount", "--machine", mounts.machine, target)
    assert (result.status, result.lines) == (0, [])
    mounted = Path(os.path.realpath(tmp_path)) / ("real" if name == "link" else name)
    mounts.targets.append(mounted)
    (device,) = mounts_on(mounted)
    assert Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text() == "1024\n"
    for pid in server_and_standby(target):
        os.kill(pid, signal.SIGTERM)
    wait_until("mount gone", lambda: not mounts_on(mounted))
    wait_until("processes gone", lambda: not processes_of(target))


def test_target_that_is_not_there_is_one_line(mounts: Mounts, tmp_path: Path) -> None:
    result = oldmem("mount", "--machine", mounts.machine, tmp_path / "nothing")
    assert result.status == 1
    assert result.lines == [f"oldmem: cannot mount on {tmp_path}/nothing: No such file or directory"]


def kill_all(target: Path) -> None:
    """Both at once: neither may see the other's end."""
    pair = server_and_standby(target)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pair:
            os.kill(pid, number)
    wait_until("processes gone", lambda: not processes_of(target))


def test_dead_mount_is_taken_away_by_the_next_start(mounts: Mounts, tmp_path: Path, saved_small: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    mounts.mount(target)
    kill_all(target)
    assert len(mounts_on(target)) == 1
    result = oldmem("mount", "--layout", "kernel", "--machine", mounts.machine, target)
    line = f"oldmem: warning: {target}: the oldmem that served it is dead; its mount is taken away"
    assert (result.status, result.lines) == (0, [line])
    assert len(mounts_on(target)) == 1
    assert same(target / "vmcore", saved_small)


def test_server_that_does_not_answer_is_told_as_such(mounts: Mounts, tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    mounts.mount(target)
    pair = server_and_standby(target)
    for pid in pair:
        os.kill(pid, signal.SIGSTOP)
    try:
        result = oldmem("mount", "--machine", mounts.machine, target)
    finally:
        for pid in pair:
            os.kill(pid, signal.SIGCONT)
    assert result.status == 1
    assert (
        f"{target} is served already, by another oldmem that does not answer (gave no answer within 5 s)"
        in (result.lines[0])
    )


def test_caller_with_closed_standard_files_gets_a_working_mount(
    mounts: Mounts, tmp_path: Path, saved_small: Path
) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    mounts.targets.append(target)
    command = f'exec "{sys.executable}" -m capture mount --layout kernel --machine "$0" "$1" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command, mounts.machine, target], timeout=60)
    assert done.returncode == 0
    assert same(target / "vmcore", saved_small)


BRING_UP = """
from capture.dump import build
from capture.init import bring_up
from capture.image_machine import ImageMachine
from capture.recorded import load
from guard.errors import Error
machine, folder, over = sys.argv[1:]
try:
    print(bring_up(build(ImageMachine(load(machine)), "kernel"), folder, over, print))
except Error as e:
    print("error:", e)
"""


def test_init_step_puts_it_over_the_file_and_all_of_it_ends_by_one_umount_each(
    mounts: Mounts, tmp_path: Path, saved_small: Path
) -> None:
    folder, over = tmp_path / "run", tmp_path / "vmcore"
    over.write_bytes(b"the kernel's own")
    mounts.targets += [over, folder]
    assert ask(BRING_UP, mounts.machine, folder, over) == f"{over}\n"
    assert same(over, saved_small)
    assert same(folder / "vmcore.direct", saved_small)
    again = ask(BRING_UP, mounts.machine, folder, over)
    assert again.startswith(f"error: {over} is served already, by another oldmem that is alive: ")
    assert same(over, saved_small)
    subprocess.run(["umount", over], check=True, timeout=20)
    assert over.read_bytes() == b"the kernel's own"
    subprocess.run(["umount", folder], check=True, timeout=20)
    wait_until_gone(folder)


def test_init_step_is_undone_wholly_when_its_processes_are_ended(mounts: Mounts, tmp_path: Path) -> None:
    folder, over = tmp_path / "run", tmp_path / "vmcore"
    over.write_bytes(b"the kernel's own")
    mounts.targets += [over, folder]
    ask(BRING_UP, mounts.machine, folder, over)
    for pid in server_and_standby(folder):
        os.kill(pid, signal.SIGTERM)
    wait_until_gone(folder)
    assert not mounts_on(over)
    assert over.read_bytes() == b"the kernel's own"


def test_init_step_repairs_what_a_crash_of_all_processes_has_left(
    mounts: Mounts, tmp_path: Path, saved_small: Path
) -> None:
    folder, over = tmp_path / "run", tmp_path / "vmcore"
    over.write_bytes(b"the kernel's own")
    mounts.targets += [over, folder]
    ask(BRING_UP, mounts.machine, folder, over)
    kill_all(folder)
    told = ask(BRING_UP, mounts.machine, folder, over).splitlines()
    gone = "the oldmem that served it is dead; its mount is taken away"
    assert told == [f"{over}: {gone}", f"{folder}: {gone}", str(over)]
    assert (len(mounts_on(folder)), len(mounts_on(over))) == (1, 1)
    assert same(over, saved_small)


def test_init_step_without_a_vmcore_of_the_kernel_gives_the_folder(
    mounts: Mounts, tmp_path: Path, saved_small: Path
) -> None:
    folder = tmp_path / "run"
    mounts.targets.append(folder)
    assert ask(BRING_UP, mounts.machine, folder, tmp_path / "vmcore") == f"{folder}/vmcore\n"
    assert same(folder / "vmcore", saved_small)


def test_init_step_that_fails_half_way_is_undone(mounts: Mounts, tmp_path: Path) -> None:
    folder, over = tmp_path / "run", tmp_path / "vmcore"
    over.mkdir()
    mounts.targets += [over, folder]
    assert ask(BRING_UP, mounts.machine, folder, over).startswith(f"error: cannot mount on {over}: ")
    wait_until_gone(folder)
    assert not mounts_on(over)
