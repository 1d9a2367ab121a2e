# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line itself: usage, help, and standard files that are closed, full or gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from capture import cli
from guard.errors import Error

COMMANDS = ("map", "plug", "header", "guard", "mount", "save", "check", "record", "init")

outside_of_capture = pytest.mark.skipif(os.path.exists("/proc/vmcore"), reason="this is a capture environment")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $OLDMEM is the command."""
    command = f"set -o pipefail; oldmem() {{ '{sys.executable}' -m capture \"$@\"; }}; {line}"
    env = {**os.environ, **environment}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=env)
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["map", "--layout", "round"],
        ["map", "--mode", "static"],
        ["map", "too", "many"],
        ["header"],
        ["save"],
        ["save", "-o"],
        ["mount"],
        ["check"],
        ["record"],
        ["map", "--source", "tape"],
        ["plug", "--layout", "cut"],
        ["plug", "--machine", ""],
        ["save", "-o", ""],
        ["header", "-o", ""],
        ["mount", ""],
        ["run", "--report", "", "--", "true"],
        ["check", ""],
        ["record", ""],
    ],
)
def test_wrong_arguments_are_status_2_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: oldmem")
    assert "error: " in err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: oldmem {command} ")
    assert err == ""


def test_help_lists_the_commands_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in COMMANDS if f"    {name} " not in out] == []
    assert "3 not in a capture environment" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"oldmem {cli.VERSION}\n"


@pytest.mark.parametrize("columns", ["", "x", "-5", "0", "1", "80", "9" * 30, "²"])
def test_any_width_of_the_terminal_will_do(columns: str) -> None:
    done = shell("oldmem --help", COLUMNS=columns)
    assert (done.returncode, done.stderr) == (0, "")
    assert "exit status: 0 done" in done.stdout


@outside_of_capture
@pytest.mark.parametrize(
    "arguments", [["map"], ["plug"], ["header", "-o", "x"], ["save", "-o", "x"], ["record", "x"], ["init"]]
)
def test_outside_of_a_capture_environment_it_is_status_3_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "oldmem: this is no capture environment: no /proc/vmcore and no elfcorehdr= (--force: go on anyway)\n"
    )
    assert not os.path.exists("x")


def test_error_is_status_1_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        raise Error("file: what and why")

    monkeypatch.setitem(cli.COMMANDS, "check", fail)
    assert cli.run(["check", "x"]) == 1
    assert capsys.readouterr() == ("", "oldmem: file: what and why\n")


def test_no_memory_is_status_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise MemoryError

    monkeypatch.setitem(cli.COMMANDS, "check", fail)
    assert cli.run(["check", "x"]) == 1
    assert capsys.readouterr().err == "oldmem: out of memory\n"


def test_interrupt_is_status_130_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "check", fail)
    assert cli.run(["check", "x"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        ("oldmem --help >/dev/full", 1, "oldmem: standard output: No space left on device\n"),
        ("oldmem --help >&-", 1, "oldmem: standard output: Bad file descriptor\n"),
        ("oldmem --help >&- 2>&-", 1, ""),
        ("oldmem --help 2>&- >/dev/null", 0, ""),
        ("oldmem --help <&- >/dev/null", 0, ""),
        ("oldmem --help | true; exit ${PIPESTATUS[0]}", None, ""),
        ("oldmem check /nothing 2>/dev/full", 1, ""),
        ("oldmem check /nothing 2>&-", 1, ""),
        ("oldmem check /nothing >&- <&-", 1, "oldmem: /nothing: No such file or directory\n"),
    ],
)
def test_standard_files_that_are_closed_full_or_gone(line: str, status: int | None, told: str) -> None:
    done = shell(line)
    assert done.returncode in ((0, 141) if status is None else (status,))
    assert done.stderr == told


def python(code: str, to: str) -> subprocess.CompletedProcess[str]:
    code = "import os, resource, sys; from capture import cli, console\n" + code
    return shell(f"'{sys.executable}' -c \"$CODE\" {to}", CODE=code)


@pytest.mark.parametrize("to", [">&-", ">/dev/full", "| true"])
def test_word_that_standard_output_does_not_take_is_dropped(to: str) -> None:
    code = """
console.fill_standard_descriptors()
if os.path.exists("/proc/self/fd/1") and "pipe" in os.readlink("/proc/self/fd/1"):
    import select; select.poll().poll(0); p = select.poll(); p.register(1, 0); p.poll()
was = os.fstat(1)
console.say("served")
console.say("and told")
assert os.path.samestat(was, os.fstat(1))
sys.exit(4)
"""
    done = python(code, f"{to}; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stdout, done.stderr) == (4, "", "")


def test_output_is_given_up_without_a_free_descriptor() -> None:
    code = """
import contextlib
with contextlib.suppress(OSError):
    sys.stdout.write("lost")
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
console.give_up(1)
"""
    done = python(code, ">/dev/full")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lack_of_descriptors_is_not_called_an_error_of_the_output() -> None:
    code = """
def fail(_):
    os.pipe()
cli.COMMANDS["check"] = fail
sys.argv[1:] = ["check", "x"]
console.tell("")
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
cli.fill_standard_descriptors = lambda: None
cli.main()
"""
    done = python(code, "")
    assert (done.returncode, done.stderr) == (1, "oldmem: \noldmem: Too many open files\n")


def test_line_stays_one_whatever_the_names_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "/no\nthing/x"]) == 1
    assert capsys.readouterr().err == "oldmem: /no\\nthing/x: No such file or directory\n"


def test_command_that_the_initramfs_lacks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "capture.check", None)
    monkeypatch.delattr("capture.check", raising=False)
    assert cli.run(["check", "x"]) == 1
    assert capsys.readouterr().err == "oldmem: check is not part of this initramfs (no module capture.check)\n"
