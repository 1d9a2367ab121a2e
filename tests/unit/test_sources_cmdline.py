# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.sources import cmdline
from capture.sources.cmdline import NO_HEADER, CommandLine, Elfcorehdr
from capture.sources.report import ELFCOREHDR, Finding, Problems


def parse(text: str) -> tuple[CommandLine, tuple[str, ...]]:
    problems = Problems()
    return cmdline.parse(text.encode(), "cmdline", problems), problems.lines()


HEADERS = [
    ("quiet", None),
    ("elfcorehdr=0x2bffe000", (0x2BFFE000, None)),
    ("elfcorehdr=0X2BFFE000", (0x2BFFE000, None)),
    ("elfcorehdr=720888K irqpoll", (720888 << 10, None)),
    ("elfcorehdr=16K@720888k", (720888 << 10, 16 << 10)),
    ("elfcorehdr=0x4000@0x2bff8000 quiet", (0x2BFF8000, 0x4000)),
    ("elfcorehdr=1G", (1 << 30, None)),
    ("elfcorehdr=017", (15, None)),
    ('"elfcorehdr=4096"', (4096, None)),
    ('elfcorehdr="4096"', (4096, None)),
    ("elfcorehdr=1 elfcorehdr=2", (2, None)),
    ("elfcorehdr=4096 elfcorehdr=0xffffffffffffffff", (NO_HEADER, None)),
    ("quiet -- elfcorehdr=4096", None),
    ("xelfcorehdr=4096 elfcorehdrs=1 elfcorehdr", None),
    ('a="b elfcorehdr=1" quiet', None),
    ("elfcorehdr=0x10000000000001000", (0x1000, None)),
]


@pytest.mark.parametrize(("text", "expected"), HEADERS)
def test_elfcorehdr_is_read_as_the_kernel_reads_it(text: str, expected: tuple[int, int | None] | None) -> None:
    line, problems = parse(text + "\n")
    assert line.elfcorehdr == (None if expected is None else Elfcorehdr(*expected))
    assert problems == ()


BAD_HEADERS = [
    ("elfcorehdr=", 0, "cmdline: 'elfcorehdr=': expected [size[KMG]@]offset[KMG]; taken as address 0x0"),
    ("elfcorehdr=header", 0, "cmdline: 'elfcorehdr=header': expected"),
    ("elfcorehdr=4096x", 4096, "taken as address 0x1000, as the kernel does"),
    ("elfcorehdr=1@2@3", 2, "cmdline: 'elfcorehdr=1@2@3': expected"),
    ("elfcorehdr=-1", 0, "cmdline: 'elfcorehdr=-1': expected"),
    ("elfcorehdr=0xg", 0, "cmdline: 'elfcorehdr=0xg': expected"),
    ("elfcorehdr=09", 0, "cmdline: 'elfcorehdr=09': expected"),
]


@pytest.mark.parametrize(("text", "addr", "message"), BAD_HEADERS)
def test_malformed_elfcorehdr_is_told(text: str, addr: int, message: str) -> None:
    line, problems = parse(text)
    assert line.elfcorehdr is not None
    assert line.elfcorehdr.addr == addr
    assert len(problems) == 1
    assert message in problems[0]


RELAXED = [
    ("quiet", False),
    ("iomem=relaxed", True),
    ("iomem=strict", False),
    ("iomem=relaxed iomem=strict", False),
    ("iomem=strict iomem=relaxed", True),
    ("iomem=relaxed iomem=nonsense", True),
    ("-- iomem=relaxed", False),
    ("xiomem=relaxed", False),
]


@pytest.mark.parametrize(("text", "relaxed"), RELAXED)
def test_last_iomem_parameter_wins(text: str, relaxed: bool) -> None:
    assert parse(text)[0].iomem_relaxed is relaxed


def put(root: Path, text: str) -> str:
    (root / "proc").mkdir()
    (root / "proc/cmdline").write_text(text)
    return str(root)


def test_header_is_a_finding(tmp_path: Path) -> None:
    report = cmdline.read(put(tmp_path, "elfcorehdr=16K@0x2bff8000 iomem=relaxed\n"))
    assert report.available
    assert report.problems == ()
    assert report.findings == (Finding(0x2BFF8000, 0x2BFFC000, ELFCOREHDR, "elfcorehdr= parameter"),)


@pytest.mark.parametrize("text", ["quiet\n", "elfcorehdr=0xffffffffffffffff\n", ""])
def test_command_line_without_a_header_has_no_finding(tmp_path: Path, text: str) -> None:
    report = cmdline.read(put(tmp_path, text))
    assert report.available
    assert not report.findings
    assert not report.problems


def test_header_without_a_size_is_an_empty_range_at_its_address(tmp_path: Path) -> None:
    report = cmdline.read(put(tmp_path, "elfcorehdr=0xfffffffffffffffe\n"))
    assert [(f.start, f.end) for f in report.findings] == [(NO_HEADER - 1, NO_HEADER - 1)]


def test_overlong_command_line_is_refused(tmp_path: Path) -> None:
    report = cmdline.read(put(tmp_path, "x" * 65537))
    assert not report.available
    assert "proc/cmdline: has 65537 bytes, expected at most 65536" in report.problems[0]


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_every_address_and_size_comes_back(addr: int, size: int) -> None:
    assert parse(f"elfcorehdr={size:#x}@{addr}")[0].elfcorehdr == Elfcorehdr(addr, size)


@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_never_raise(data: bytes, parameter: bool) -> None:
    line = cmdline.parse(b"elfcorehdr=" * parameter + data, "cmdline", Problems())
    assert line.elfcorehdr is None or 0 <= line.elfcorehdr.addr < 1 << 64


# ---- the next kernel's command line

DROPPED = ("elfcorehdr", "oldmem.stage")
OURS = ["memmap=64K$0x1000000", "elfcorehdr=0x1000000", "oldmem.stage=2"]

REWRITTEN = [
    ("", " ".join(OURS)),
    ("quiet  elfcorehdr=1\tnr_cpus=1\n", f"quiet nr_cpus=1 {' '.join(OURS)}"),
    ('root="/dev/a b" "elfcorehdr=1 2" elfcorehdr="3"', f'root="/dev/a b" {" ".join(OURS)}'),
    ("oldmem.stage elfcorehdr oldmem.stage=back", " ".join(OURS)),
    ("quiet -- elfcorehdr=1 x", f"quiet {' '.join(OURS)} -- elfcorehdr=1 x"),
    ('quiet "--" x', f'quiet {" ".join(OURS)} "--" x'),
    ("elfcorehdrs=1 oldmem.stages=2 a--b", f"elfcorehdrs=1 oldmem.stages=2 a--b {' '.join(OURS)}"),
]


@pytest.mark.parametrize(("line", "expected"), REWRITTEN)
def test_ours_are_put_in_and_all_else_stays_as_it_is_written(line: str, expected: str) -> None:
    assert cmdline.rewritten(line, DROPPED, OURS) == expected


plain = st.text(st.sampled_from('abc=.-_$@0x1"\u00e9\udcff'), min_size=1, max_size=6)
quoted = st.text(st.sampled_from("ab= \t"), max_size=6).map(lambda text: f'"{text}"')
words = st.one_of(
    plain.filter(lambda word: word.count('"') % 2 == 0 and not word.replace('"', "").startswith("--=")),
    st.tuples(plain.map(lambda word: word.replace('"', "")), quoted).map("=".join),
    st.sampled_from(["elfcorehdr", "oldmem.stage", "iomem"]).flatmap(
        lambda name: st.one_of(st.just(name), quoted.map(lambda value: f"{name}={value}"), st.just(f"{name}=7K@9"))
    ),
    st.sampled_from(['"elfcorehdr=1 2"', '"oldmem.stage=2"', "iomem=relaxed", "--"]),
)


def name_of(word: str) -> str:
    return word.replace('"', "").partition("=")[0]


@given(st.lists(words, max_size=8), st.sampled_from([" ", "  ", "\t", "\n "]))
def test_kernel_finds_exactly_ours_whatever_the_line_was(line: list[str], between: str) -> None:
    made = cmdline.rewritten(between.join(line), DROPPED, OURS)
    found = cmdline.parse(made.encode("utf-8", "surrogateescape"), "cmdline", Problems())
    assert (found.elfcorehdr, found.stage) == (Elfcorehdr(0x1000000, None), "2")
    assert found.iomem_relaxed == parse(" ".join(line).encode("ascii", "ignore").decode())[0].iomem_relaxed
    lone = next((i for i, word in enumerate(line) if word.replace('"', "") == "--"), len(line))
    kept = [word for word in line[:lone] if name_of(word) not in DROPPED]
    assert made == " ".join([*kept, *OURS, *line[lone:]])
    assert cmdline.rewritten(made, [*DROPPED, "memmap"], OURS) == made


@pytest.mark.parametrize(
    ("line", "stage"),
    [("quiet", None), ("oldmem.stage=2 oldmem.stage=back", "back"), ('"oldmem.stage=2"', "2"), ("oldmem.stage", "")],
)
def test_stage_is_the_last_one_that_is_told(line: str, stage: str | None) -> None:
    assert cmdline.stage_of(line) == stage
    assert cmdline.stage_of(f"name=\udcff {line} -- oldmem.stage=x") == stage
