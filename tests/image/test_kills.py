# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any one process killed at any moment: no mount that does not answer, no dump that comes to an end.

While it all starts, a moment is a line of Python at which a process ends itself (killed_at.py); afterwards moments come
at random. OLDMEM_KILLS=N tries about N of each kind instead of a few; from some hundred on, every line."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from guard import child
from tests.image.conftest import Recorded
from tests.image.test_fuse import mounts_on
from tests.pace import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")

KILLS = int(os.environ.get("OLDMEM_KILLS", "5"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LINES = {"command": 240, "server": 120, "standby": 36, "probe": 4}  # of Python until all is served, more or less
LONG = 30.0  # seconds that what must come to pass may take on a busy machine


def processes_named(name: str) -> dict[int, int]:
    """Process ids, with their parents', of what is called *name* and lives."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            comm, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if comm == name and state not in "ZX":
                found[int(pid)] = int(parent)
    return found


class Started(NamedTuple):
    """A command under way, and where it mounts."""

    starter: subprocess.Popen[str]
    name: str
    folder: Path
    over: Path
    pid: int

    def ended(self) -> tuple[int, bool]:
        """Its status; whether the line was come to at which one of its processes was to be killed."""
        assert self.starter.stdout is not None
        status, killed = self.starter.stdout.readline().split()
        return os.waitstatus_to_exitcode(int(status)), killed == "1"

    def servers(self) -> list[int]:
        """Server and standby, in this order, as far as they are there. The probe is a child of the command too, in
        the session of the starter."""
        found = processes_named(self.name)
        with contextlib.suppress(OSError):
            pair = [pid for pid in found if pid != self.pid and os.getsid(pid) != os.getsid(self.starter.pid)]
            return sorted(pair, key=lambda pid: found[pid] in pair)
        return []

    def mounted(self) -> list[Path]:
        return [target for target in (self.folder, self.over) if mounts_on(target)]

    def dead_mounts(self) -> list[Path]:
        """What is mounted and stays so, but does not answer."""
        return [target for target in self.mounted() if is_dead(target) and mounts_on(target) and is_dead(target)]

    def gone(self) -> bool:
        return not self.mounted() and not processes_named(self.name)

    def whole(self) -> bool:
        return len(self.servers()) == 2 and len(self.mounted()) == 1 + self.over.is_file()

    def settle(self) -> None:
        """Until all of it is there or nothing. No look at it meets a dead mount."""

        def settled() -> bool:
            assert not self.dead_mounts()
            return self.gone() or self.whole()

        wait_until("all or nothing", settled, LONG)

    def end(self) -> None:
        """By TERM to all, as systemd does it: again for those that were not there yet."""

        def ended() -> bool:
            for pid in self.servers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            return self.gone()

        wait_until("all gone", ended, LONG)
        assert self.over.read_bytes() == b"what was there before"


def is_dead(target: Path) -> bool:
    """Asked in a child: no test hangs with a server that does not answer."""

    def look() -> None:
        try:
            os.statvfs(target)
            with open(target / "vmcore" if target.is_dir() else target, "rb", buffering=0) as file:
                file.read(4)
        except OSError as e:
            if e.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
                raise

    return child.run(look, LONG) != ""


def ends_as(target: Path, reference: Path) -> bool:
    """Are the first and the last bytes of *target* those of *reference*?"""

    def look() -> None:
        with target.open("rb", buffering=0) as a, reference.open("rb", buffering=0) as b:
            for at, whence in ((0, os.SEEK_SET), (-(1 << 20), os.SEEK_END)):
                a.seek(at, whence)
                b.seek(at, whence)
                assert a.read(1 << 20) == b.read(1 << 20)

    return child.run(look, LONG) == ""


class Commands:
    def __init__(self, machine: Path, folder: Path) -> None:
        self._starter = subprocess.Popen(
            [sys.executable, "-m", "tests.image.killed_at", machine],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._folder = folder
        self._n = 0
        self._made: list[Started] = []

    def start(self, how: str, whom: str = "nobody", line: int = 0, number: int = 0) -> Started:
        self._n += 1
        folder = self._folder / f"mnt{self._n}"
        over = self._folder / f"vmcore{self._n}"
        folder.mkdir()
        over.write_bytes(b"what was there before")
        name = f"k{self._starter.pid}.{self._n}"
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        self._starter.stdin.write("\t".join(map(str, (name, how, folder, over, whom, line, number))) + "\n")
        self._starter.stdin.flush()
        started = Started(self._starter, name, folder, over, int(self._starter.stdout.readline()))
        self._made.append(started)
        return started

    def close(self) -> None:
        self._starter.kill()
        self._starter.communicate()
        for made in self._made:
            for pid in processes_named(made.name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for target in (made.over, made.folder):
                for _ in mounts_on(target):
                    subprocess.run(["umount", "-l", target], timeout=20, stderr=subprocess.DEVNULL)


@pytest.fixture
def commands(small_machine: Recorded, tmp_path: Path) -> Iterator[Commands]:
    made = Commands(small_machine.folder, tmp_path)
    yield made
    made.close()


def lines(commands: Commands, how: str, whom: str, number: int) -> Iterator[tuple[int, Started, int]]:
    """Each line at which that process can be killed, or some of them; the command, which has ended, and its status."""
    line, rng = 0, random.Random(f"{how} {whom} {number}")
    while True:
        line += rng.randint(1, max(1, 2 * LINES[whom] // KILLS - 1))
        command = commands.start(how, whom, line, number)
        status, killed = command.ended()
        if not killed:
            assert status == 0
            command.end()
            return
        yield line, command, status


@pytest.mark.parametrize("number", SIGNALS)
def test_command_killed_at_any_line_leaves_all_or_nothing(number: signal.Signals, commands: Commands) -> None:
    seen: Counter[str] = Counter()
    for line, command, status in lines(commands, "init", "command", number):
        assert status
        command.settle()
        seen["all" if command.whole() else "nothing"] += 1
        assert seen["nothing"] or line > 5
        command.end()
    assert seen["nothing"]
    print(dict(seen))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("whom", ["server", "standby", "probe"])
def test_server_killed_at_any_line_while_the_command_starts_costs_nothing_once_there_are_two(
    whom: str, number: signal.Signals, commands: Commands, saved_small: Path
) -> None:
    seen: Counter[str] = Counter()
    for line, command, status in lines(commands, "init", whom, number):
        seen[f"status {status}"] += 1
        if status:
            assert whom == "server"
            assert not seen["status 0"], line
            wait_until("all gone", command.gone, LONG)
        else:
            command.settle()
            assert command.whole(), line
            assert ends_as(command.over, saved_small)
            command.end()
    assert seen["status 0"]
    print(dict(seen))


@pytest.mark.parametrize("number", SIGNALS)
def test_command_in_the_foreground_leaves_nothing_whenever_it_is_killed(
    number: signal.Signals, commands: Commands
) -> None:
    """It never lets go of its servers: also when nobody has mounted yet, and when all is served."""
    rng, seen = random.Random(number), Counter[str]()
    for n in range(2 * KILLS):
        command = commands.start("foreground")
        for what in ("server", "standby", "mount")[: n % 4]:
            wait_until(what, command.mounted if what == "mount" else command.servers, LONG)
        time.sleep(rng.uniform(0, 0.02))
        seen["mounted" if command.mounted() else "not yet mounted"] += 1
        os.kill(command.pid, number)
        command.ended()

        def gone(command: Started = command) -> bool:
            assert not command.dead_mounts()
            return command.gone()

        wait_until("all gone", gone, LONG)
    print(dict(seen))


READER = """
path, reference = sys.argv[1:]
rounds = 0
with open(path, "rb", buffering=0) as a, open(reference, "rb", buffering=0) as b:
    size = os.fstat(b.fileno()).st_size
    while not os.path.exists(reference + ".stop"):
        for at in range(0, size, 1 << 18):
            assert os.pread(a.fileno(), 1 << 18, at) == os.pread(b.fileno(), 1 << 18, at), hex(at)
        rounds += 1
        print(rounds, flush=True)
"""


@pytest.mark.parametrize("name", ["vmcore", "vmcore.direct"])
def test_reader_gets_every_byte_while_servers_are_killed_under_it(
    name: str, commands: Commands, saved_small: Path, tmp_path: Path
) -> None:
    command = commands.start("init")
    assert command.ended() == (0, False)
    reference = tmp_path / "reference"
    reference.symlink_to(saved_small)
    reader = subprocess.Popen(
        [sys.executable, "-c", "import os, sys\n" + READER, command.folder / name, reference],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "1\n"
    rng = random.Random(name)
    try:
        for n in range(4 * KILLS):
            wait_until("server and standby", lambda: len(command.servers()) == 2, LONG)
            # by TERM the next standby comes a second later
            number = signal.SIGKILL if n % 8 else rng.choice((signal.SIGTERM, signal.SIGINT))
            time.sleep(rng.uniform(0, 0.02))
            if len(both := command.servers()) == 2:
                os.kill(rng.choice((both[0], both[0], both[1])), number)
            assert reader.poll() is None
        (tmp_path / "reference.stop").touch()
        assert reader.communicate(timeout=LONG)[1] == ""
        assert reader.returncode == 0
    finally:
        reader.kill()
        reader.wait()
    assert not command.dead_mounts()
    command.end()
