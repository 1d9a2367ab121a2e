# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command as scripts use it: streams, pipes that end early, outputs that cannot be written, interruptions."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.image.conftest import Recorded
from tests.image.machines import oldmem, phdrs_of
from tests.pace import patience, wait_until


def shell(line: str, *arguments: str | Path, timeout: float = 60.0) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash; $0, $1... are *arguments*."""
    command = f"oldmem() {{ '{sys.executable}' -m capture \"$@\"; }}; {line}"
    done = subprocess.run(["bash", "-c", command, *map(str, arguments)], capture_output=True, timeout=patience(timeout))
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done


def test_stream_has_the_same_bytes_as_the_sparse_file(
    small_machine: Recorded, saved_small: Path, tmp_path: Path
) -> None:
    line = 'oldmem save --layout kernel --machine "$0" -o - | cat >"$1"; exit ${PIPESTATUS[0]}'
    done = shell(line, small_machine.folder, tmp_path / "streamed")
    assert done.returncode == 0
    assert filecmp.cmp(tmp_path / "streamed", saved_small, shallow=False)
    assert done.stderr.decode().splitlines()[-1] == "oldmem: saving vmcore complete"


def test_progress_lines_are_makedumpfiles(small_machine: Recorded, tmp_path: Path) -> None:
    result = oldmem("save", "--machine", small_machine.folder, "-o", tmp_path / "out")
    assert re.fullmatch(r"Copying data : \[100\.0 %\] / eta: 0s  ", result.lines[-2])


def test_reader_that_has_enough_gets_it_and_the_command_says_so_in_one_line(small_machine: Recorded) -> None:
    done = shell('oldmem save --machine "$0" -o - | head -c 100; exit ${PIPESTATUS[0]}', small_machine.folder)
    assert done.returncode == 1
    assert done.stdout.startswith(b"\x7fELF")
    assert len(done.stdout) == 100
    assert done.stderr == b"oldmem: output: the reader closed the pipe before the vmcore was complete\n"


@pytest.mark.parametrize("command", ["map", "map --json", "plug", "plug --json", "map --compare", "header -o -"])
def test_pipe_that_ends_early_is_no_drama(command: str, small_machine: Recorded) -> None:
    for end in ("true", "head -1"):
        done = shell(f'oldmem {command} --machine "$0" | {end}; exit ${{PIPESTATUS[0]}}', small_machine.folder)
        assert done.returncode in (0, 141)
        assert done.stderr == b""


@pytest.mark.parametrize("command", ["map", "map --json", "header -o -", "save -o -"])
def test_standard_output_that_is_full_or_closed_is_one_line(command: str, small_machine: Recorded) -> None:
    for end, why in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
        done = shell(f'oldmem {command} --machine "$0" {end}', small_machine.folder)
        assert done.returncode == 1
        assert done.stderr.decode() == f"oldmem: standard output: {why}\n"


@pytest.mark.parametrize("end", ["2>/dev/full", "2>&-", "2>&1 >/dev/null | true"])
def test_console_that_is_full_closed_or_gone_does_not_cost_the_dump(
    end: str, small_machine: Recorded, saved_small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = shell(
        f'oldmem save -v --layout kernel --machine "$0" -o "$1" {end}; exit ${{PIPESTATUS[0]}}',
        small_machine.folder,
        out,
    )
    assert done.returncode == 0
    assert filecmp.cmp(out, saved_small, shallow=False)


@pytest.mark.parametrize("command", ["header", "save"])
def test_output_that_cannot_be_written_is_one_line(command: str, small_machine: Recorded, tmp_path: Path) -> None:
    for name, why in (("", "Is a directory"), ("nothing/out", "No such file or directory")):
        result = oldmem(command, "--machine", small_machine.folder, "-o", tmp_path / name)
        assert result.status == 1
        assert len(result.lines) == 1
        assert result.lines[0].startswith(f"oldmem: {tmp_path}")
        assert result.lines[0].endswith(f": {why}")


def test_device_that_is_full_is_one_line(small_machine: Recorded) -> None:
    for command in ("header", "save"):
        result = oldmem(command, "--machine", small_machine.folder, "-o", "/dev/full")
        assert (result.status, result.lines) == (1, ["oldmem: /dev/full: No space left on device"])


def test_full_disk_is_status_1_and_one_line_and_no_dump_by_its_final_name(
    small_machine: Recorded, small_disk: Path
) -> None:
    out = small_disk / "vmcore"
    result = oldmem("save", "--machine", small_machine.folder, "-o", out)
    assert result.status == 1
    assert result.lines == [f"oldmem: {out}: No space left on device; {out}-incomplete has what fitted"]
    assert os.listdir(small_disk) == ["vmcore-incomplete"]


@pytest.mark.parametrize("command", ["header", "guard"])
def test_full_disk_leaves_no_header_and_no_guard(command: str, small_machine: Recorded, small_disk: Path) -> None:
    with open(small_disk / "filler", "wb") as filler:
        filler.write(bytes(64 << 10))
    result = oldmem(command, "-q", "--machine", small_machine.folder, "-o", small_disk / "out")
    assert (result.status, result.lines) == (1, [f"oldmem: {small_disk}/out: No space left on device"])
    assert os.listdir(small_disk) == ["filler"]


@pytest.mark.parametrize("command", ["header", "guard", "save"])
@pytest.mark.parametrize("to", ["/dev/stdout", "/dev/fd/3", "/proc/self/fd/3"])
def test_descriptor_that_is_named_is_written_to(command: str, to: str, small_machine: Recorded, tmp_path: Path) -> None:
    line = f'(echo before; oldmem {command} -q --machine "$0" -o {to}; echo after) >"$1" 3>&1'
    done = shell(line, small_machine.folder, tmp_path / "named")
    assert done.returncode == 0
    assert stat.S_ISLNK(os.lstat("/dev/stdout").st_mode)
    shell(f'oldmem {command} -q --machine "$0" -o - >"$1"', small_machine.folder, tmp_path / "streamed")
    streamed = (tmp_path / "streamed").read_bytes()
    assert (tmp_path / "named").read_bytes() == b"before\n" + streamed + b"after\n"


def test_existing_dump_is_replaced_on_request_only_and_refused_before_anything_is_done(
    small_machine: Recorded, saved_small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"of yesterday")
    refused = oldmem("save", "--machine", tmp_path / "no machine", "-o", out)
    assert (refused.status, refused.lines) == (1, [f"oldmem: {out}: is there already (--overwrite: replace it)"])
    assert out.read_bytes() == b"of yesterday"
    options = ("--layout", "kernel", "--overwrite", "--machine", small_machine.folder)
    assert oldmem("save", *options, "-o", out).status == 0
    assert filecmp.cmp(out, saved_small, shallow=False)


def test_save_that_is_killed_at_any_moment_leaves_no_dump_by_its_final_name(
    small_machine: Recorded, saved_small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "capture", "save", "-q", "--layout", "kernel"]
    command += ["--machine", str(small_machine.folder), "-o", str(out)]
    for size in (1, 1 << 20, 3 << 20, 5 << 20):  # of what is written so far
        saving = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        part = tmp_path / "out-incomplete"
        while saving.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if part.stat().st_blocks * 512 >= size:
                    break
        saving.kill()
        saving.wait(timeout=20)
        if out.exists():
            assert filecmp.cmp(out, saved_small, shallow=False)
            out.unlink()
    assert oldmem(*command[3:]).status == 0
    assert os.listdir(tmp_path) == ["out"]
    assert filecmp.cmp(out, saved_small, shallow=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_save_leaves_no_dump_by_its_final_name(
    number: signal.Signals, small_machine: Recorded, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    command = [sys.executable, "-m", "capture", "save", "--machine", str(small_machine.folder), "-o", str(fifo)]
    saving = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        # until it has written something, and waits for us to read more
        wait_until("something written", lambda: select.select([reader], [], [], 0)[0] and os.read(reader, 1))
        saving.send_signal(number)
        err = saving.communicate(timeout=20)[1]
    finally:
        saving.kill()
        saving.wait()
        os.close(reader)
    assert saving.returncode == (130 if number == signal.SIGINT else -number)
    assert b"Traceback" not in err


def test_quiet_is_quiet_and_verbose_tells_more(tmp_path: Path, small_machine: Recorded) -> None:
    verbose = oldmem("header", "-v", "--machine", small_machine.folder, "-o", tmp_path / "a")
    assert verbose.lines[-1] == "oldmem: memory read from images"
    assert oldmem("header", "-q", "--machine", small_machine.folder, "-o", tmp_path / "b").lines == []
    assert filecmp.cmp(tmp_path / "a", tmp_path / "b", shallow=False)


def test_quiet_plug_is_quiet(tmp_path: Path, small_machine: Recorded) -> None:
    shutil.copytree(small_machine.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.raw"))
    document = json.loads((tmp_path / "copy/machine.json").read_text())
    for entry in [*document["ram"], *document["virtio_mem"]]:  # that they lie elsewhere is told
        entry["image"] = str(small_machine.folder / entry["image"])
    (tmp_path / "copy/machine.json").write_text(json.dumps(document))
    assert oldmem("plug", "--machine", tmp_path / "copy").lines
    assert oldmem("plug", "-q", "--machine", tmp_path / "copy").lines == []


@pytest.mark.parametrize(
    "arguments", ["run --vmcore x", "header -o x", "guard -o x", "save -o x", "record --minimal x"]
)
def test_working_directory_that_is_gone_is_told(arguments: str, small_machine: Recorded, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command, _, more = arguments.partition(" ")
    behind = "-- true" if command == "run" else ""
    code = "from capture.cli import main; main()"
    line = f"cd gone && rmdir ../gone && {sys.executable} -c '{code}' {command} -q --machine \"$0\" {more} {behind}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["bash", "-c", line, small_machine.folder], cwd=tmp_path, capture_output=True, timeout=60, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.decode() in (
        "oldmem: x: No such file or directory\n",
        "oldmem: working directory: No such file or directory\n",
    )


def test_header_to_standard_output(small_machine: Recorded, tmp_path: Path) -> None:
    oldmem("header", "--machine", small_machine.folder, "-o", tmp_path / "header")
    done = shell('oldmem header --machine "$0" -o -', small_machine.folder)
    assert done.stdout == (tmp_path / "header").read_bytes()
    assert phdrs_of(done.stdout)[0].type == 4


def test_only_a_live_machine_is_recorded(small_machine: Recorded, tmp_path: Path) -> None:
    result = oldmem("record", "--machine", small_machine.folder, tmp_path / "new")
    assert result.status == 1
    assert len(result.lines) == 1
    assert not (tmp_path / "new").exists()


def test_folder_may_be_named_by_a_relative_path(small_machine: Recorded, tmp_path: Path) -> None:
    done = shell('cd "$0" && oldmem plug --json --machine .', small_machine.folder)
    assert json.loads(done.stdout)["devices"][0]["block_size"] == 2 << 20
    done = shell('cd "$0" && oldmem plug --machine .', tmp_path)
    assert done.returncode == 1
    assert done.stderr == b"oldmem: ./machine.json: No such file or directory\n"


def test_name_that_is_not_utf_8_is_written_and_told(small_machine: Recorded, tmp_path: Path) -> None:
    """In a locale whose standard output takes no such name."""
    line = 'cd "$1"; export PYTHONIOENCODING=utf-8:strict; oldmem record --minimal --machine "$0" $\'r\\xff\''
    done = shell(line, small_machine.folder, tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b" in r\\udcff\n")
    assert os.listdir(os.fsencode(tmp_path)) == [b"r\xff"]


def test_init_over_a_recorded_machine_in_a_mount_namespace_of_its_own(
    small_machine: Recorded, as_root: None, tmp_path: Path
) -> None:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse")
    if os.path.exists("/proc/vmcore"):
        pytest.skip("this is a capture environment")
    script = tmp_path / "script"
    script.write_text(
        "mount -t tmpfs tmpfs /run || exit 99\n"
        'oldmem init --machine "$0" && ls /run/oldmem && head -c 4 /run/oldmem/vmcore | tail -c 3\n'
        'echo; oldmem init --machine "$0"; echo $?\n'
        "umount /run/oldmem\n"
    )
    line = 'export -f oldmem; exec timeout 50 unshare -mpf --kill-child --mount-proc bash "$1" "$0"'
    line = line.replace('bash "$1" "$0"', 'bash -c ". $1" "$0"').replace("$1", str(script))
    done = shell(line, small_machine.folder)
    if done.returncode == 99:
        pytest.skip("cannot mount in a namespace")
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("oldmem: guarded vmcore at /run/oldmem/vmcore (")
    assert lines[1:] == ["guard.json", "map.json", "vmcore", "vmcore.direct", "ELF", "1"]
    ours = "is served already, by another oldmem that is alive: end that first, by oldmem done or umount -l /run/oldmem"
    assert done.stderr.decode() == f"oldmem: /run/oldmem {ours}\n"
