# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any one process killed at any moment: no mount that does not answer, no dump that comes to an end.

The moments are drawn from the time that an undisturbed start takes here; what must hold holds at each of them, so that
no check depends on which ones they are. OLDMEM_KILLS=N tries N of each kind instead of a few."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.image.conftest import Recorded
from tests.image.test_fuse import ask, mounts_on, same, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")

KILLS = int(os.environ.get("OLDMEM_KILLS", "5"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONG = 30.0  # seconds that what must come to pass may take on a busy machine

# Starts commands, each a child with a name of its own, which its own children inherit: one line says what to do, and
# the answers are its process id and, once it has ended, its wait status
STARTER = """
import os, signal, sys
from capture.dump import build
from capture.fuse import FuseServer
from capture.image_machine import ImageMachine
from capture.init import bring_up
from capture.recorded import load
from capture.service import Service
from guard._core import ffi, lib

PR_SET_NAME = 15
dump = build(ImageMachine(load(sys.argv[1])), "kernel")
for line in sys.stdin:
    name, how, folder, over = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            word = ffi.new("char[]", name.encode())
            lib.prctl(PR_SET_NAME, word)
            if how == "init":
                bring_up(dump, folder, over)
            else:
                server = FuseServer(dump.vmcore, folder, {})
                with Service(server, [server.target]) as service:
                    server.mount()
                    service.mounted()
                    service.wait_until_served()
                    service.wait_until_ended()
            code = 0
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


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

    def status(self) -> int:
        assert self.starter.stdout is not None
        return os.waitstatus_to_exitcode(int(self.starter.stdout.readline()))

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
    code = """
import errno
try:
    os.statvfs(sys.argv[1])
    with open(sys.argv[1] + "/vmcore" if os.path.isdir(sys.argv[1]) else sys.argv[1], "rb") as file:
        file.read(4)
    print(0)
except OSError as e:
    print(e.errno)
"""
    return ask(code, target, timeout=LONG).strip() in (str(errno.ENOTCONN), str(errno.ECONNABORTED), str(errno.EIO))


class Commands:
    def __init__(self, machine: Path, folder: Path) -> None:
        self._starter = subprocess.Popen(
            [sys.executable, "-c", STARTER, machine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._folder = folder
        self._n = 0
        self._made: list[Started] = []

    def start(self, how: str) -> Started:
        self._n += 1
        folder = self._folder / f"mnt{self._n}"
        over = self._folder / f"vmcore{self._n}"
        folder.mkdir()
        over.write_bytes(b"what was there before")
        name = f"k{self._starter.pid}.{self._n}"
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        self._starter.stdin.write(f"{name}\t{how}\t{folder}\t{over}\n")
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


@pytest.fixture
def start_takes(commands: Commands) -> float:
    """Seconds of an undisturbed start, as they are here and now."""
    begun = time.monotonic()
    command = commands.start("init")
    assert command.status() == 0
    seconds = time.monotonic() - begun
    assert command.whole()
    command.end()
    return seconds


@pytest.mark.parametrize("number", SIGNALS)
def test_command_killed_while_it_starts_leaves_all_or_nothing(
    number: signal.Signals, commands: Commands, start_takes: float
) -> None:
    rng = random.Random(number)
    for _ in range(KILLS):
        command = commands.start("init")
        time.sleep(rng.uniform(0, 1.2) * start_takes)
        with contextlib.suppress(ProcessLookupError):
            os.kill(command.pid, number)
        command.status()
        command.settle()
        command.end()


@pytest.mark.parametrize("number", SIGNALS)
def test_command_in_the_foreground_leaves_nothing_whenever_it_is_killed(
    number: signal.Signals, commands: Commands, start_takes: float
) -> None:
    """It never lets go of its servers: also when nobody has mounted yet, and when all is served."""
    rng = random.Random(number)
    for _ in range(KILLS):
        command = commands.start("foreground")
        time.sleep(rng.uniform(0, 2) * start_takes)
        os.kill(command.pid, number)
        command.status()

        def gone(command: Started = command) -> bool:
            assert not command.dead_mounts()
            return command.gone()

        wait_until("all gone", gone, LONG)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("whom", [0, 1], ids=["server", "standby"])
def test_server_killed_while_the_command_starts_costs_at_most_that_start(
    whom: int, number: signal.Signals, commands: Commands, start_takes: float, saved_small: Path
) -> None:
    """It costs none where the standby was there; without one, nothing is mounted."""
    rng = random.Random(10 * number + whom)
    for _ in range(KILLS):
        command = commands.start("init")
        delay = rng.uniform(0, 1) * start_takes
        wait_until("servers", lambda c=command: len(c.servers()) > whom or not processes_named(c.name), LONG)
        time.sleep(delay)
        both = command.servers()
        if len(both) > whom:
            with contextlib.suppress(ProcessLookupError):
                os.kill(both[whom], number)
        if command.status():
            assert len(both) < 2
            wait_until("all gone", command.gone, LONG)
            continue
        command.settle()
        assert command.whole()
        assert same(command.over, saved_small)
        command.end()


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
    assert command.status() == 0
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
