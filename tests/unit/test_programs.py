# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs of the capture environment: found as a shell would, told apart by their ELF header, run with their status
told as a shell does."""

from __future__ import annotations

import os
import signal
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import programs
from tests.unit.stage_parts import open_files


def program(path: Path, *lines: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def test_first_of_path_is_found_and_only_what_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/a:{tmp_path}/b:{tmp_path}/c")
    assert programs.find("a-tool-of-no-name") is None
    last = program(tmp_path / "c/a-tool-of-no-name")
    assert programs.find("a-tool-of-no-name") == last
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a-tool-of-no-name").write_text("no program")
    (tmp_path / "a/a-tool-of-no-name").chmod(0o644)
    assert programs.find("a-tool-of-no-name") == last
    first = program(tmp_path / "b/a-tool-of-no-name")
    assert programs.find("a-tool-of-no-name") == first


def test_roots_programs_are_found_though_path_leaves_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    asked: list[str] = []

    def can_run(path: str, mode: int) -> bool:
        asked.append(path)
        return path == "/sbin/modprobe" and mode == os.X_OK

    monkeypatch.setattr(os, "access", can_run)
    assert programs.find("modprobe") == "/sbin/modprobe"
    assert asked == [f"{tmp_path}/modprobe", "/usr/sbin/modprobe", "/sbin/modprobe"]


def elf(*kinds: int, order: str = "<", bits: int = 2, offset: int = 64, size: int = 56) -> bytes:
    """An ELF file with program headers of these types."""
    ident = b"\x7fELF" + bytes((bits, 1 if order == "<" else 2, 1)) + bytes(9)
    head = struct.pack(order + "16sHHIQQQIHHHHHH", ident, 2, 62, 1, 0, offset, 0, 0, 64, size, len(kinds), 0, 0, 0)
    return head.ljust(offset, b"\0") + b"".join(struct.pack(order + "I", kind).ljust(size, b"\0") for kind in kinds)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("data", "static"),
    [
        ({"kinds": (1, 1, 2)}, True),
        ({"kinds": ()}, True),
        ({"kinds": (6, 3, 1)}, False),
        ({"kinds": (1, 1, 3)}, False),
        ({"kinds": (1, 3), "offset": 256}, False),
        ({"kinds": (1, 1), "offset": 4000}, True),
        ({"kinds": (1, 1), "bits": 1}, False),
        ({"kinds": (1, 1), "size": 0}, True),
    ],
)
def test_program_without_an_interpreter_is_static(
    order: str, data: dict[str, object], static: bool, tmp_path: Path
) -> None:
    path = tmp_path / "program"
    rest = {key: value for key, value in data.items() if key != "kinds"}
    path.write_bytes(elf(*data["kinds"], order=order, **rest))  # type: ignore[misc, arg-type]
    assert programs.is_static(str(path)) is static


def test_script_or_what_is_not_there_is_not_called_static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not programs.is_static(program(tmp_path / "script"))
    assert not programs.is_static("script")
    assert not programs.is_static("none")
    assert not programs.is_static(f"{tmp_path}/none")
    assert not programs.is_static(str(tmp_path))


def test_command_without_a_folder_is_looked_for_in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kinds in (("a", (1, 3)), ("b", (1,))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program").write_bytes(elf(*kinds))
    monkeypatch.setenv("PATH", f"{tmp_path}/none:{tmp_path}/b:{tmp_path}/a")
    assert programs.is_static("program")
    monkeypatch.chdir(tmp_path / "b")
    monkeypatch.setenv("PATH", f":{tmp_path}/a")
    assert programs.is_static("program")


@given(
    st.one_of(
        st.binary(max_size=200).map(lambda rest: elf(1, 3)[:16] + rest),
        st.integers(4030, 4100).map(lambda offset: elf(1, 2, offset=offset).ljust(5000, b"\0")),
    )
)
def test_no_damaged_elf_header_is_more_than_a_wrong_answer(data: bytes) -> None:
    fd = os.memfd_create("program")
    try:
        os.write(fd, data)
        assert programs.is_static(f"/proc/self/fd/{fd}") in (True, False)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("line", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 128 + 9), ("kill -TERM $$", 128 + 15)]
)
def test_status_is_told_as_a_shell_tells_it(line: str, status: int, tmp_path: Path) -> None:
    before = open_files()
    assert programs.spawn([program(tmp_path / "program", line)]) == status
    assert open_files() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_command_gets_its_arguments_and_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("OF_THE_TEST", "a b")
    program(tmp_path / "a-tool-of-no-name", f'printf "%s|" "$OF_THE_TEST" "$@" > {tmp_path}/out')
    assert programs.spawn(["a-tool-of-no-name", "x y", ""]) == 0
    assert (tmp_path / "out").read_text() == "a b|x y||"


def test_command_that_cannot_be_run_is_one_clear_line(tmp_path: Path) -> None:
    for command, told, status in (
        (f"{tmp_path}/none", f"{tmp_path}/none: No such file or directory", 127),
        ("", "'': No such file or directory", 127),
        (str(tmp_path), f"{tmp_path}: Permission denied", 126),
    ):
        with pytest.raises(programs.CommandError) as caught:
            programs.spawn([command])
        assert (str(caught.value), caught.value.status) == (told, status)


INTERRUPTER = f"""#!{sys.executable}
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
for _ in range(500):  # the parent may not have come to wait for us yet
    with open(f"/proc/{{os.getppid()}}/status") as file:
        if int(file.read().split("SigIgn:")[1].split()[0], 16) & 2:
            break
    time.sleep(0.01)
os.kill(os.getppid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
"""


def test_interrupt_from_the_terminal_ends_the_command_and_not_us(tmp_path: Path) -> None:
    """It goes to both: here the command sends it to its parent, then ends by it itself."""
    path = tmp_path / "program"
    path.write_text(INTERRUPTER)
    path.chmod(0o755)
    seen: list[int] = []

    def handler(number: int, frame: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        assert programs.spawn([str(path)]) == 128 + signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == []
