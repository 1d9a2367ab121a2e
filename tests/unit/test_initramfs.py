# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image as a whole: reproducible, its Python runs in it from whatever prefix it came, collectors of another system
run beside the host's, sizes stay within the budget, bad input is one line."""

from __future__ import annotations

import gzip
import marshal
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from guard.errors import Error
from initramfs.__main__ import main
from initramfs.builder import Builder, image_path
from initramfs.elfdeps import Searcher
from initramfs.pyclosure import program_root

UNPACKED_BUDGET, ZSTD_BUDGET = 12_000_000, 4_200_000

STAND_IN = """
import sys

def closure():
    import argparse, ctypes, errno, fcntl, json, mmap, os, select, signal, stat, struct, time
    import _cffi_backend, encodings.ascii, encodings.latin_1
    import capture.cli
    files = [m.__file__ for m in list(sys.modules.values()) if isinstance(getattr(m, "__file__", None), str)]
    return files + [__file__.replace("closure.py", "data/table.bin")]
"""
COMMAND = 'import sys\n\ndef main():\n    """Docs."""\n    print("oldmem", *sys.argv[1:], main.__doc__)\n    return 3\n'
PROBE = "/tmp/probe"  # not python -c, which from 3.13 on wants the module linecache
IMPORTS = "import struct, ctypes, _cffi_backend, sys, capture; print(sys.prefix, capture.__file__)"
PROGRAM_READY = os.path.exists(os.path.join(program_root(), "capture", "closure.py"))

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")
needs_busybox = pytest.mark.skipif(shutil.which("busybox") is None, reason="no busybox")
needs_zstd = pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd tool")
needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio tool")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small program with the entry points that the builder relies on."""
    root = tmp_path_factory.mktemp("program")
    (root / "capture" / "data").mkdir(parents=True)
    (root / "capture" / "__init__.py").write_text("")
    (root / "capture" / "cli.py").write_text(COMMAND)
    (root / "capture" / "closure.py").write_text(STAND_IN)
    (root / "capture" / "data" / "table.bin").write_bytes(b"\1\2\3")
    return str(root)


def unpack(builder: Builder, folder: Path) -> Path:
    folder.mkdir()
    subprocess.run(["cpio", "-idm", "--quiet"], input=builder.archive(), cwd=folder, check=True)
    return folder


def chroot(folder: Path, *command: str, status: int = 0) -> str:
    run = subprocess.run(
        ["chroot", str(folder), *command],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin"},
        check=False,
    )
    assert run.returncode == status, run.stderr
    assert run.stderr == ""
    return run.stdout.strip()


def interpreters() -> list[str]:
    """Interpreters of every kind at hand that can pack the program: this one, Debian's, private builds."""
    private = Path.home().glob(".pyenv/versions/3.1[1-9]*/bin/python3")
    return [sys.executable, "/usr/bin/python3", *sorted(map(str, private))]


@needs_root
@needs_cpio
@pytest.mark.parametrize("interpreter", interpreters())
def test_the_images_python_runs_whatever_its_prefix(interpreter: str, program: str, cache: str, tmp_path: Path) -> None:
    if subprocess.run([interpreter, "-c", "import _cffi_backend"], capture_output=True, check=False).returncode:
        pytest.skip(f"{interpreter} has no _cffi_backend")
    builder = Builder(cache)
    python = builder.add_python(interpreter, path=[program])
    builder.add_bytes(PROBE, IMPORTS.encode())
    image = unpack(builder, tmp_path / "image")
    library = python.replace("bin", "lib")
    assert chroot(image, python, PROBE) == f"/usr {library}/capture/__init__.pyc"
    assert chroot(image, "/usr/bin/oldmem", "a", "b", status=3) == "oldmem a b None"
    assert not list(image.rglob("*.py"))
    assert (image / library[1:] / "capture" / "data" / "table.bin").read_bytes() == b"\1\2\3"


@needs_busybox
def test_two_builds_are_byte_identical_with_and_without_a_warm_cache(program: str, tmp_path: Path) -> None:
    def build(cache: Path) -> bytes:
        builder = Builder(str(cache))
        builder.add_busybox()
        builder.add_python(path=[program])
        builder.add_init(run="makedumpfile -d 31 /proc/vmcore /mnt/dump")
        builder.write(str(tmp_path / "image"), "gzip", 1)
        return (tmp_path / "image").read_bytes()

    first = build(tmp_path / "one")
    assert build(tmp_path / "two") == first
    for compiled in sorted((tmp_path / "two").glob("*.pyc"))[::2]:
        compiled.unlink()
    assert build(tmp_path / "two") == first


@needs_root
@needs_cpio
def test_tracebacks_have_the_lines_of_our_code_and_pass_through_the_standard_librarys(
    program: str, cache: str, tmp_path: Path
) -> None:
    builder = Builder(cache)
    python = builder.add_python(path=[program])
    builder.add_bytes(PROBE, b"import argparse, capture\nargparse.ArgumentParser(fail=1)\n")
    image = unpack(builder, tmp_path / "image")
    run = subprocess.run(["chroot", str(image), python, PROBE], capture_output=True, text=True, check=False)
    assert run.stderr.splitlines()[-1].startswith("TypeError: ")
    assert f'File "{PROBE}", line 2, in <module>' in run.stderr
    library = image / python[1:].replace("bin", "lib")
    ours, theirs = (
        marshal.loads((library / name).read_bytes()[16:]) for name in ("capture/__init__.pyc", "argparse.pyc")
    )
    assert (bool(ours.co_linetable), theirs.co_linetable) == (True, b"")


@needs_zstd
@pytest.mark.skipif(sys.base_prefix != "/usr", reason="the budget counts with the distribution's own interpreter")
@pytest.mark.parametrize(
    "what",
    ["interpreter", pytest.param("program", marks=pytest.mark.skipif(not PROGRAM_READY, reason="no capture.closure"))],
)
def test_python_stays_within_the_size_budget(what: str, program: str, cache: str, tmp_path: Path) -> None:
    builder = Builder(cache)
    builder.add_python(path=[program] if what == "interpreter" else None)
    (size,) = [line for line in builder.sizes("none") if line.part == "python"]
    assert size.unpacked <= UNPACKED_BUDGET
    assert builder.write(str(tmp_path / "image"), "zstd", 19) <= ZSTD_BUDGET


@needs_root
@needs_cpio
@pytest.mark.skipif(not PROGRAM_READY, reason="no capture.closure")
@pytest.mark.parametrize("arguments", [["--help"], ["map"], ["map", "--machine", "/nonexistent"], ["init", "--help"]])
def test_the_program_finds_all_its_modules_in_the_image(arguments: list[str], cache: str, tmp_path: Path) -> None:
    builder = Builder(cache)
    builder.add_python()
    image = unpack(builder, tmp_path / "image")
    command = ["chroot", str(image), "/usr/bin/oldmem", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/sbin:/usr/bin"}, check=False)
    assert "Traceback" not in run.stderr
    assert run.returncode in (0, 1, 3)


@needs_root
@needs_cpio
@needs_busybox
def test_a_sysroots_collector_runs_on_its_own_c_library(tmp_path: Path, cache: str) -> None:
    closure = Searcher().closure("/usr/bin/env")
    assert closure.interp is not None
    root = tmp_path / "trixie"
    for place, source in [
        ("usr/sbin/collector", "/usr/bin/env"),
        ("usr/lib64/" + os.path.basename(closure.interp.name), closure.interp.path),
        *((f"usr/lib/x-linux-gnu/{library.name}", library.path) for library in closure.libraries),
    ]:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / place)
    builder = Builder(cache)
    builder.add_busybox()
    assert builder.add_binary("/usr/sbin/collector", sysroot=str(root)) == "/usr/bin/collector"
    image = unpack(builder, tmp_path / "image")
    assert not list(image.glob("usr/lib/**/libc.so*"))
    assert chroot(image, "/usr/bin/collector", "sh", "-c", "echo $((6 * 7))") == "42"
    assert (image / "opt/trixie/bin/collector").stat().st_mode & 0o111


@needs_root
@needs_cpio
@needs_busybox
def test_busybox_answers_to_its_applets_and_gives_way_to_added_programs(tmp_path: Path, cache: str) -> None:
    builder = Builder(cache)
    builder.add_busybox()
    builder.add_binary("/usr/bin/env")
    image = unpack(builder, tmp_path / "image")
    assert chroot(image, "/bin/sh", "-c", "echo hello | tr a-z A-Z") == "HELLO"
    assert not (image / "usr/bin/env").is_symlink()
    assert "GNU" in chroot(image, "/usr/bin/env", "--version")
    assert stat.S_ISCHR((image / "dev/console").stat().st_mode)


def test_files_land_in_the_merged_usr() -> None:
    assert image_path("/lib/modules/x") == "usr/lib/modules/x"
    assert image_path("//bin/./sh") == "usr/bin/sh"
    assert image_path("/library/x") == "library/x"
    with pytest.raises(Error, match="not a path"):
        image_path("/etc/../passwd")


def test_same_file_twice_is_fine_and_another_under_its_name_is_not(cache: str) -> None:
    builder = Builder(cache)
    builder.add_bytes("/etc/x", b"1")
    builder.add_bytes("/etc/x", b"1")
    with pytest.raises(Error, match="/etc/x: added twice with different contents"):
        builder.add_bytes("/etc/x", b"2")
    builder.add_bytes("/etc/x/y", b"3")
    with pytest.raises(Error, match="/etc/x is not a folder in the image"):
        builder.archive()


@pytest.mark.parametrize("method", ["gzip", pytest.param("zstd", marks=needs_zstd)])
def test_compressed_image_is_the_archive(method: str, tmp_path: Path, cache: str) -> None:
    builder = Builder(cache)
    builder.add_tree("/data", str(tmp_path))
    builder.add_bytes("/big", bytes(range(256)) * 4000)
    size = builder.write(str(tmp_path / "image"), method, 3)
    data = (tmp_path / "image").read_bytes()
    assert len(data) == size
    tool = subprocess.run(["zstd", "-qdc"], input=data, capture_output=True, check=False).stdout
    assert (gzip.decompress(data) if method == "gzip" else tool) == builder.archive()


@needs_root
@needs_cpio
def test_listed_files_are_enough_for_another_builder(program: str, cache: str, tmp_path: Path) -> None:
    builder = Builder(cache)
    python = builder.add_python(path=[program])
    builder.add_bytes(PROBE, IMPORTS.encode())
    image = tmp_path / "other"
    for path, source in builder.stage(str(tmp_path / "stage")):
        place = image / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)
    (image / "lib64").symlink_to("usr/lib64")
    (image / "lib").symlink_to("usr/lib")
    assert chroot(image, python, PROBE).startswith("/usr ")
    assert chroot(image, "/usr/bin/oldmem", status=3) == "oldmem None"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def closure(): raise RuntimeError('two\\nlines')", "lines"),
        ("import nonesuch", "ModuleNotFoundError: No module named 'nonesuch'"),
        ("def closure(): return ['/nowhere/x.py']", "/nowhere/x.py, which is in none of the packages"),
    ],
)
def test_a_program_that_cannot_report_is_one_clear_line(source: str, message: str, tmp_path: Path, cache: str) -> None:
    (tmp_path / "capture").mkdir()
    (tmp_path / "capture" / "__init__.py").write_text("")
    (tmp_path / "capture" / "closure.py").write_text(source)
    with pytest.raises(Error, match=message) as caught:
        Builder(cache).add_python(path=[str(tmp_path)])
    assert "\n" not in str(caught.value)


@needs_busybox
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--collector", "/nonexistent/makedumpfile"], 1, "/nonexistent/makedumpfile: no such program"),
        (["--collector", __file__], 1, "test_initramfs.py: not an ELF file"),
        (["--busybox", "/nonexistent/busybox"], 1, "/nonexistent/busybox: no such program"),
        (["--busybox", "/bin/cat"], 1, "not a busybox with the applets sh and insmod"),
        (["--init", "/nonexistent/init"], 1, "/nonexistent/init: No such file or directory"),
        (["--add", "/nonexistent/file:/etc/file"], 1, "/nonexistent/file: No such file or directory"),
        (["--kernel-modules", "/nonexistent", "--module", "fuse"], 1, "/nonexistent: not a folder"),
        (["--sysroot", "/nonexistent", "--collector", "x"], 1, "/nonexistent: not a folder"),
        (["-o", "/nonexistent/image"], 1, "/nonexistent/image: No such file or directory"),
        (["--module", "fuse"], 2, "--module needs --kernel-modules"),
        (["--sysroot", "/"], 2, "--sysroot needs --collector"),
        (["--add", "/etc/passwd"], 2, "--add /etc/passwd: not SRC:DST"),
        (["--init", "/bin/sh", "--run", "true"], 2, "--run goes with the default /init"),
    ],
)
def test_bad_input_is_one_clear_line_and_a_status(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "image"
    given = [] if "-o" in arguments else ["-o", str(output)]
    try:
        found = main(["--no-python", "--compression", "none", *given, *arguments])
    except SystemExit as ended:
        found = int(ended.code or 0)
    assert found == status
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert status == 2 or len(lines) == 1
    assert not output.exists()


@needs_busybox
def test_command_line_builds_an_image_and_tells_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "image"
    arguments = ["--no-python", "--compression", "gzip", "--level", "1", "--size", "-o", str(output)]
    assert main([*arguments, "--add", f"{__file__}:/root/note", "--run", "true"]) == 0
    assert gzip.decompress(output.read_bytes())[:6] == b"070701"
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert table == ["part", "base", "busybox", "other", "total"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shell_scripts_are_clean() -> None:
    folder = Path(program_root(), "initramfs")
    scripts = [folder / "init.sh", folder / "dracut/55oldmem/module-setup.sh", folder / "initramfs-tools/hook"]
    assert subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False).stdout == ""
