# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of the service: `oldmem done` says what reads lost, and leaves neither mount nor process."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capture.cli import finished
from capture.done import end
from capture.dump import build
from capture.image_machine import ImageMachine
from capture.recorded import load
from capture.report import as_json, guard_json
from guard._core import lib
from guard.errors import Error
from guard.physmem import MAX_FAULTS
from tests.image.machines import LOW, PAGE, RecordedKernel

HAVE_FUSE = os.geteuid() == 0 and os.path.exists("/dev/fuse") and not os.path.exists("/proc/vmcore")
needs_fuse = pytest.mark.skipif(not HAVE_FUSE, reason="needs root and /dev/fuse, and no capture kernel")


def in_namespace(folder: Path, script: str, tmp_path: Path) -> list[str]:
    """The lines that *script* says, run in a mount namespace with an empty /run; $0 is *folder*, o runs the command.
    All processes that it has started end with it, whatever its end."""
    head = f'mount -t tmpfs tmpfs /run || exit 99\no() {{ "{sys.executable}" -m capture "$@"; }}\n'
    (tmp_path / "script").write_text(head + script)
    apart = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    words = ["timeout", "60", *apart, "bash", "-c", f". {tmp_path}/script"]
    done = subprocess.run([*words, folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90)
    if done.returncode == 99:
        pytest.skip("cannot mount in a namespace")
    return done.stdout.splitlines()


@pytest.fixture
def small(tmp_path: Path) -> RecordedKernel:
    machine = RecordedKernel()
    machine.shrink()
    machine.finish_kernel()
    (tmp_path / "machine").mkdir()
    machine.write(tmp_path / "machine")
    return machine


@needs_fuse
def test_done_ends_the_service_and_keeps_the_reports(small: RecordedKernel, tmp_path: Path) -> None:
    script = """
        o init -q --machine "$0" >/dev/null; echo init $?
        cat /run/oldmem/vmcore >/dev/null
        o done; echo done $?
        grep -c /run/oldmem /proc/self/mountinfo
        for i in $(seq 100); do pgrep -f "init -q --machine $0" >/dev/null || break; sleep 0.1; done; echo waited
        pgrep -f "init -q --machine $0"
        ls /run/oldmem
        o done; echo again $?
    """
    lines = in_namespace(tmp_path / "machine", script, tmp_path)
    assert lines == ["init 0", "done 0", "0", "waited", "guard.json", "map.json", "again 0"]


def stop_post() -> str:
    """What systemd runs at the end of the unit, whatever has happened."""
    unit = Path(__file__).parents[2] / "initramfs/systemd/oldmem.service"
    (line,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStopPost=")]
    return line.removeprefix("ExecStopPost=-/usr/bin/")


@needs_fuse
def test_units_end_takes_dead_mounts_away_and_nothing_else(small: RecordedKernel, tmp_path: Path) -> None:
    script = f"""
        o init -q --machine "$0" >/dev/null; echo init $?
        mkdir /run/else /run/over; mount -t tmpfs oldmem /run/else; mount --bind /run/oldmem /run/over
        pids=$(pgrep -f "init -q --machine $0"); kill -STOP $pids; kill -KILL $pids
        for i in $(seq 100); do pgrep -f "init -q --machine $0" >/dev/null || break; sleep 0.1; done
        cat /run/oldmem/vmcore 2>&1 >/dev/null | sed 's/.*: //'
        {stop_post()}; echo stopped $?
        grep 'fuse.oldmem' /proc/self/mountinfo | grep -c ' /run/oldmem '
        grep -c /run/else /proc/self/mountinfo
        o init -q --machine "$0" >/dev/null; echo init $?
        cat /run/oldmem/vmcore | head -c 4 | tail -c 3; echo
        o done; echo done $?
    """
    lines = in_namespace(tmp_path / "machine", script, tmp_path)
    assert lines[:5] == ["init 0", "Transport endpoint is not connected", "stopped 0", "0", "1"]
    assert lines[5:] == ["init 0", "ELF", "done 0"]


@needs_fuse
def test_init_and_done_after_a_crash_of_all_processes_just_work(small: RecordedKernel, tmp_path: Path) -> None:
    script = """
        o init -q --machine "$0" >/dev/null
        end() { pids=$(pgrep -f "init -q --machine $0"); kill -STOP $pids; kill -KILL $pids; }
        end; o init -q --machine "$0"; echo init $?
        cat /run/oldmem/vmcore | head -c 4 | tail -c 3; echo
        o init -q --machine "$0"; echo again $?
        end; o done; echo done $?
        grep 'fuse.oldmem' /proc/self/mountinfo | grep -c ' /run/oldmem '
    """
    lines = in_namespace(tmp_path / "machine", script, tmp_path)
    assert lines[0] == "oldmem: warning: /run/oldmem: the oldmem that served it is dead; its mount is taken away"
    assert "init 0" in lines
    assert lines[lines.index("init 0") + 1] == "ELF"
    assert (
        "oldmem: /run/oldmem is served already, by another oldmem that is alive: end that first, by oldmem done or "
        + ("umount -l /run/oldmem")
        in lines
    )
    assert lines[-4] == "again 1"
    assert "guard.json: no report, so that nothing tells what reads have lost" in lines[-3]
    assert lines[-2:] == ["done 1", "0"]


@needs_fuse
def test_done_tells_what_reads_lost_after_init_had_gone_well(small: RecordedKernel, tmp_path: Path) -> None:
    """The image is cut off while it is served, as broken memory would be."""
    script = f"""
        o init -q --machine "$0" >/dev/null; echo init $?
        truncate -s {LOW[1] + 4 * PAGE} "$0/ram.raw"
        cat /run/oldmem/vmcore.direct >/dev/null
        o done; echo done $?
    """
    lines = in_namespace(tmp_path / "machine", script, tmp_path)
    assert lines[0] == "init 0"
    assert lines[-1] == "done 4"
    (line,) = lines[1:-1]
    assert line.startswith("oldmem: warning: 0x")
    assert line.endswith(" could not be read and is zeros: No data available")


@needs_fuse
def test_report_that_cannot_be_kept_does_not_hide_what_reads_lost(small: RecordedKernel, tmp_path: Path) -> None:
    script = f"""
        mount -o remount,size=64k /run; o init -q --machine "$0" >/dev/null; echo init $?
        truncate -s {LOW[1] + 4 * PAGE} "$0/ram.raw"
        cat /run/oldmem/vmcore.direct >/dev/null
        cat /dev/zero >/run/full 2>/dev/null
        o done; echo done $?
        grep -c "oldmem.* /run/oldmem " /proc/self/mountinfo; ls /run/oldmem
    """
    lines = in_namespace(tmp_path / "machine", script, tmp_path)
    assert (lines[0], lines[3:]) == ("init 0", ["done 1", "0"])
    assert lines[1].endswith(" could not be read and is zeros: No data available")
    assert lines[2] == "oldmem: /run/oldmem/guard.json: No space left on device: the report is not kept"


@needs_fuse
@pytest.mark.parametrize("to", [">&-", ">/dev/full", ">&- 2>&- <&-"])
def test_init_whose_words_nobody_takes_serves_and_runs_its_command(
    to: str, small: RecordedKernel, tmp_path: Path
) -> None:
    script = f"""
        o init -q --machine "$0" -- head -c4 /run/oldmem/vmcore {to}; echo init $?
        o done; echo done $?
        o init -q --machine "$0" {to}; echo init $?
        o init -q --machine "$0" -- no-such-command >/dev/null; echo refused $?
        o done; echo done $?
        o init -q --machine "$0" -- no-such-command >/dev/null; echo init $?
        o done; echo done $?
    """
    lines = in_namespace(tmp_path / "machine", script, tmp_path)
    told = [line for line in lines if not line.startswith(("head: ", "oldmem: "))]
    assert told == ["init 1", "done 0", "init 0", "refused 1", "done 0", "init 127", "done 0"]


@needs_fuse
def test_service_keeps_nothing_of_its_callers(small: RecordedKernel, tmp_path: Path) -> None:
    """Working directory, lock, pipe; nor is its folder for all to write to where the umask is 0."""
    script = """
        umask 0
        mkdir /run/on; mount -t tmpfs none /run/on; cd /run/on
        (flock 9; said=$(o init -q --machine "$0" 8>&1 >/dev/null); echo init $?) 9>lock
        flock -n lock echo free
        cd /; umount /run/on; echo umount $?
        o done; echo done $?; stat -c %a /run/oldmem
    """
    assert in_namespace(tmp_path / "machine", script, tmp_path) == ["init 0", "free", "umount 0", "done 0", "755"]


@needs_fuse
def test_service_that_another_mount_hides_is_in_nobodys_way(small: RecordedKernel, tmp_path: Path) -> None:
    script = """
        o init -q --machine "$0" >/dev/null; echo init $?
        mount -t tmpfs none /run; mount -t tmpfs none /run
        o init -q --machine "$0" >/dev/null; echo init $?
        head -c4 /run/oldmem/vmcore | tail -c3; echo
        o init -q --machine "$0" >/dev/null 2>&1; echo refused $?
        o done; echo done $?; ls /run/oldmem; umount /run; umount /run
        head -c4 /run/oldmem/vmcore | tail -c3; echo; o done; echo done $?
        grep -c " /run/oldmem " /proc/self/mountinfo
    """
    lines = in_namespace(tmp_path / "machine", script, tmp_path)
    assert lines[:5] == ["init 0", "init 0", "ELF", "refused 1", "done 0"]
    assert lines[5:] == ["guard.json", "map.json", "ELF", "done 0", "0"]


@needs_fuse
def test_nothing_is_mounted_where_no_proc_could_tell_of_it(small: RecordedKernel, tmp_path: Path) -> None:
    script = """
        mkdir /run/on; umount -l /proc; umount -l /proc
        o mount -q --machine "$0" /run/on; echo mount $?; ls /run/on
        o done; echo done $?
        mount -t proc proc /proc; grep -c " /run/on " /proc/self/mountinfo
    """
    why = "oldmem: /proc/self/mountinfo: No such file or directory: nothing tells what is mounted"
    assert in_namespace(tmp_path / "machine", script, tmp_path) == [why, "mount 1", why, "done 1", "0"]


def test_done_fails_where_nothing_is_served(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"guard\.json: no report, so that nothing tells what reads have lost"):
        end(str(tmp_path), str(tmp_path / "vmcore"))


@pytest.mark.parametrize("report", [b"", b"{", b"[]", b'{"lost": [1]}', b'{"unreadable": [{"start": 1}]}'])
def test_done_fails_in_one_line_where_the_report_is_none(report: bytes, tmp_path: Path) -> None:
    for name in ("guard.json", "map.json"):
        (tmp_path / name).write_bytes(report or b"")
    with pytest.raises(Error) as caught:
        end(str(tmp_path), str(tmp_path / "vmcore"))
    assert "nothing tells what reads have lost" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_done_tells_what_was_lost_before_anyone_read(tmp_path: Path) -> None:
    report = {"lost": [{"start": 0x1000, "end": 0x3000, "why": "no image holds it"}], "late_dumps": ["a device dump"]}
    (tmp_path / "guard.json").write_text(json.dumps(report))
    (tmp_path / "map.json").write_text("{}")
    assert end(str(tmp_path), str(tmp_path / "vmcore")) == (
        ["0x1000-0x2fff is lost: no image holds it", "a device dump"],
        "",
    )


def test_page_reads_beyond_the_list_of_faults_are_told_with_their_number(
    small: RecordedKernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = build(ImageMachine(load(str(tmp_path / "machine"))))
    for page in range(0, 2 * MAX_FAULTS + 6, 2):
        lib.tally_failed(dump.memory.c.tally, dump.memory.c.log, page, page + 1, errno.EFAULT)
    (tmp_path / "guard.json").write_bytes(as_json(guard_json(dump)))
    (tmp_path / "map.json").write_text("{}")
    told = f"3 reads of pages failed beyond the {MAX_FAULTS} runs that can be listed, and gave zeros"
    assert end(str(tmp_path), str(tmp_path / "vmcore"))[0][0] == told
    assert finished(dump) == 4
    assert capsys.readouterr().err.splitlines()[0] == f"oldmem: warning: {told}"
