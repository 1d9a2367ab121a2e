# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMCOREINFO from a vmlinux: ELF files made here, of a small dead kernel whose note is missing, cut, or another's."""

from __future__ import annotations

import builtins
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guard.errors import Error
from guard.ranges import RangeSet
from guard.witness import kaslr, made_note
from guard.witness.dead_kernel import DeadKernel
from guard.witness.made_note import Evidence, complete, open_vmlinux
from guard.witness.memory import Problems
from guard.witness.vmcoreinfo import Vmcoreinfo, note_at
from guard.witness.vmlinux import Vmlinux
from tests.unit import made_elf
from tests.unit.made_btf import MadeBtf
from tests.unit.witness_memory import PRSTATUS, START_KERNEL_MAP, DyingKernel, FakeMemory

BANNER = b"Linux version 6.12.0-test (kernel@example) (gcc 14.2) #1 SMP Debian\n"
BUILD_ID = "0123456789abcdef0123456789abcdef01234567"
MIB2 = 2 << 20
PAGE_OFFSETS = {"flags": (0, 8), "_mapcount": (48, 4), "compound_head": (8, 8)}
PAGE_OFFSETS |= {"mapping": (24, 8), "private": (40, 8), "_refcount": (52, 4)}


def page_btf() -> MadeBtf:
    made = MadeBtf()
    made.one_of_each_kind()
    word, long = made.integer("unsigned int", 4), made.integer("unsigned long", 8)
    members = [(name, long if width == 8 else word, at * 8) for name, (at, width) in PAGE_OFFSETS.items()]
    made.structure("page", 64, members)
    made.structure("mem_section", 32, [("section_mem_map", long, 0)])
    byte_array = made.array(made.integer("char", 1), 65)
    utsname = made.structure("new_utsname", 390, [("release", byte_array, 130 * 8)])
    made.structure("uts_namespace", 400, [("count", long, 0), ("name", utsname, 64)])
    area = made.structure("free_area", 88, [("free_list", made.array(made.structure("list_head", 16, []), 5), 0)])
    made.structure("zone", 1536, [("free_area", made.array(area, 11), 256 * 8)])
    bits = made.structure("", 128, [("bits", made.array(long, 16), 0)])
    made.add("TYPEDEF", "nodemask_t", bits)
    made.enum("pageflags", {"PG_locked": 0, "PG_lru": 5, "PG_head": 6, "PG_hwpoison": 20})
    made.enum("pagetype", {"PGTY_buddy": 0xF0, "PGTY_offline": 0xF1, "PGTY_hugetlb": 0xF4, "PGTY_slab": 0xF5})
    return made


class Dying(DyingKernel):
    """A dead kernel with a banner and its image mapped by its page tables, as a real one has, and its vmlinux."""

    def __init__(self, levels: int = 4, kaslr: int = 0x12000000, **options: Any) -> None:
        super().__init__(levels, kaslr=kaslr, **options)
        self.kaslr = kaslr
        self.variable("linux_banner", BANNER + b"\0")
        self.variable("panic_cpu", struct.pack("<i", 1))
        self.pointer("vmemmap_base", 0xFFFFEA0000000000)
        self.sections({0: 7, 1: 7})
        self.pointer("mem_section", int(self.keys["SYMBOL(mem_section)"], 16))
        self.uts("6.12.0-test")
        self.symbols.append(("T", "init_top_pgt", int(self.keys["SYMBOL(init_top_pgt)"], 16)))
        self.symbols.append(("D", "init_uts_ns", int(self.keys["SYMBOL(init_uts_ns)"], 16)))
        self.symbols.append(("t", "kaslr_get_random_long", self.text_vaddr + 64))
        self.memmap([0, 1])
        for at in range(0, 0x6000000, MIB2):
            self.tables.map(self.text_vaddr + at, self.text_paddr + at, 21)
        self.keys["BUILD-ID"] = BUILD_ID

    def linked(self) -> list[tuple[str, str, int]]:
        """All symbols, also those of the kallsyms tables, as they were linked."""
        tables = [
            ("D", key[7:-1], int(value, 16)) for key, value in self.keys.items() if key.startswith("SYMBOL(kallsyms_")
        ]
        every = [*self.symbols, *tables]
        return [(kind, name, at - self.kaslr if at >= START_KERNEL_MAP else at) for kind, name, at in every]

    def vmlinux(self, btf: bytes | None = None, build_id: str = BUILD_ID) -> bytes:
        symbols = self.linked()
        at = next(address for _, name, address in symbols if name == "linux_banner")
        types = page_btf().section() if btf is None else btf
        return made_elf.vmlinux(symbols, (at, BANNER), made_elf.build_id_note(build_id), types)

    @property
    def ram(self) -> RangeSet:
        return RangeSet([(0, 0x20000000)])


def completed(
    kernel: Dying, path: Path, info: Vmcoreinfo | None, data: bytes | None = None
) -> tuple[Evidence, Problems]:
    path.write_bytes(kernel.vmlinux() if data is None else data)
    problems = Problems()
    return complete(open_vmlinux(str(path)), info, kernel.mem, kernel.ram, problems), problems


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("offset", [0, 0x12000000, 0x3A000000 - 0x1000000])
def test_the_made_note_says_what_the_kernels_own_says(tmp_path: Path, levels: int, offset: int) -> None:
    kernel = Dying(levels, offset)
    real = kernel.finish()
    evidence, problems = completed(kernel, tmp_path / "vmlinux", None)
    assert evidence.info is not None
    made = evidence.info.texts
    lacking = {key: value for key, value in real.texts.items() if made.get(key) != value}
    # the made-up kernel has 4-level memory sections always
    assert lacking.keys() <= ({"NUMBER(MAX_PHYSMEM_BITS)", "LENGTH(mem_section)"} if levels == 5 else set())
    assert made["KERNELOFFSET"] == f"{offset:x}"
    assert made["LENGTH(zone.free_area)"] == "11"
    assert made["LENGTH(free_area.free_list)"] == "5"
    assert made["LENGTH(node_data)"] == "1024"
    assert made["NUMBER(PG_head_mask)"] == "64"
    assert made["NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)"] == str(0xF0 - 256 << 24)
    where = f"its kernel lies at {kernel.text_paddr:#x}, KASLR offset {offset:#x}"
    assert problems == [f"VMCOREINFO is made from {tmp_path}/vmlinux: {where}"]


def test_the_witness_reads_the_same_by_the_made_note(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.per_cpu_notes([PRSTATUS, None, PRSTATUS])
    kernel.iomem([(0x100000, 0x1FFFFFFF, "System RAM", 0x81000200, [])])
    kernel.pointer("page_offset_base", kernel.page_offset)
    own = DeadKernel(kernel.mem, kernel.finish())
    evidence, _ = completed(kernel, tmp_path / "vmlinux", None)
    assert evidence.info is not None
    made = DeadKernel(kernel.mem, evidence.info, evidence.symbols)
    assert made.symbols() == own.symbols()
    assert made.release() == own.release() == "6.12.0-test"
    assert made.text() == own.text()
    assert made.page_offset() == own.page_offset() == kernel.page_offset
    assert made.system_ram() == own.system_ram()
    assert made.cpu_notes() == own.cpu_notes()
    assert len(made.cpu_notes()) == 2
    assert made.sections() == own.sections()
    assert made.marks(kernel.ram) is not None
    assert made.problems == []


def test_the_made_note_is_a_whole_elf_note(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.finish()
    evidence, _ = completed(kernel, tmp_path / "vmlinux", None)
    assert evidence.info is not None
    mem = FakeMemory()
    mem.write(0x1000, evidence.info.note)
    again = note_at(mem, 0x1000)
    assert again.texts == evidence.info.texts
    assert len(evidence.info.note) % 4 == 0


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_a_cut_note_counts_as_far_as_it_goes(tmp_path: Path, share: float) -> None:
    kernel = Dying()
    real = kernel.finish()
    told = Vmcoreinfo(b"MARK=ours\n" + real.desc)
    cut = Vmcoreinfo(told.desc[: int(len(told.desc) * share)] + bytes(64))
    evidence, problems = completed(kernel, tmp_path / "vmlinux", cut)
    assert evidence.info is not None
    for key, value in told.texts.items():
        assert evidence.info.texts.get(key) == value or (key == "MARK" and not cut.texts), key
    assert evidence.info.problems == []
    assert problems[:-1] == list(cut.problems)
    assert "lines that the VMCOREINFO note lacks are made from" in problems[-1]


def test_what_a_cut_note_says_goes_before_the_vmlinux(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.finish()
    cut = Vmcoreinfo(f"OSRELEASE=6.12.0-test\nBUILD-ID={BUILD_ID}\nSIZE(page)=72\n".encode())
    evidence, _ = completed(kernel, tmp_path / "vmlinux", cut)
    assert evidence.info is not None
    assert evidence.info.size("page") == 72
    assert evidence.info.offset("page._mapcount") == 48


def test_a_whole_note_is_left_as_it_is_and_symbols_are_the_vmlinuxs(tmp_path: Path) -> None:
    kernel = Dying()
    real = kernel.finish()
    evidence, problems = completed(kernel, tmp_path / "vmlinux", real)
    assert evidence.info is real
    assert evidence.symbols is not None
    assert evidence.symbols["_text"] == kernel.text_vaddr
    assert problems == []


@pytest.mark.parametrize(
    ("note", "why"),
    [
        (
            f"OSRELEASE=6.12.0-test\nBUILD-ID={'ff' * 20}\n",
            f"BUILD-ID is {BUILD_ID}, the dead kernel's VMCOREINFO has ff",
        ),
        ("OSRELEASE=6.1.0-other\n", "OSRELEASE is 6.12.0-test, the dead kernel's VMCOREINFO has 6.1.0-other"),
        (
            f"OSRELEASE=6.1.0-other\nBUILD-ID={BUILD_ID}\nKERNELOFFSET=200000\n",
            "no such kernel in 512 MiB of old memory",
        ),
        (f"BUILD-ID={BUILD_ID}\nKERNELOFFSET=0\nNUMBER(phys_base)=-4611686018427387904\n", "no such kernel in 512 MiB"),
    ],
    ids=["build", "release", "offset", "phys_base"],
)
def test_a_vmlinux_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, note: str, why: str) -> None:
    kernel = Dying()
    kernel.finish()
    info = Vmcoreinfo(note.encode())
    evidence, problems = completed(kernel, tmp_path / "vmlinux", info)
    assert evidence == (info, None)
    (line,) = problems
    assert line.startswith(f"{tmp_path}/vmlinux: {why}")
    assert line.endswith("; it is not used")


def test_a_kernel_that_is_not_there_is_told(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.finish()
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel.vmlinux())
    kernel.mem.pages.clear()
    problems = Problems()
    assert complete(open_vmlinux(str(path)), None, kernel.mem, kernel.ram, problems) == (None, None)
    assert problems == [f"{path}: no such kernel in 512 MiB of old memory; it is not used"]


def test_a_banner_without_its_page_tables_is_no_kernel(tmp_path: Path) -> None:
    """A copy of the file in the page cache, which happens to lie right."""
    kernel = Dying()
    kernel.finish()
    at = next(address for _, name, address in kernel.symbols if name == "linux_banner") - kernel.text_vaddr
    kernel.mem.write(at + MIB2 * 2, BANNER)
    evidence, problems = completed(kernel, tmp_path / "vmlinux", None)
    assert evidence.info is not None
    assert evidence.info.number("phys_base") == kernel.phys_base
    assert len(problems) == 1


@pytest.mark.parametrize("late", [False, True])
def test_of_two_kernels_of_a_build_the_one_that_panicked_is_taken(tmp_path: Path, late: bool) -> None:
    low, high = 0x2000000, 0x12000000
    left_over, dead = Dying(kaslr=0x4000000, phys=low if late else high), Dying(phys=high if late else low)
    for kernel, cpu in ((left_over, -1), (dead, 0)):
        panic_cpu = next(at for _, name, at in kernel.symbols if name == "panic_cpu")
        kernel.write(panic_cpu, struct.pack("<i", cpu))
        kernel.finish()
    dead.mem.pages = left_over.mem.pages | dead.mem.pages
    evidence, problems = completed(dead, tmp_path / "vmlinux", None)
    assert evidence.info is not None
    assert evidence.info.number("phys_base") == dead.phys_base
    told = ["2 kernels of this build in old memory, displaced by 0x1000000, 0x11000000; that at 0x11000000 is taken"]
    assert problems[:-1] == (told if late else [])


def test_the_search_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("guard.witness.kaslr.time.monotonic", lambda: next(clock))
    marks = kaslr.Landmarks(BANNER, START_KERNEL_MAP + 0x2000000, START_KERNEL_MAP + 0x3000000, None, None)
    with pytest.raises(Exception, match=r"no such kernel below 0x[0-9a-f]+, and no more time"):
        kaslr.locate(FakeMemory(), RangeSet([(0, 1 << 46)]), marks, Problems(), time_limit=5.0)


def test_a_vmlinux_without_types_gives_symbols_alone(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.finish()
    evidence, problems = completed(kernel, tmp_path / "vmlinux", None, kernel.vmlinux(btf=b""))
    assert evidence.info is not None
    assert evidence.info.symbol("_stext") == kernel.text_vaddr
    assert evidence.info.size("page") is None
    assert f"{tmp_path}/vmlinux: has neither .BTF nor .debug_info: offsets, sizes and flags are not known" in problems


def test_page_types_of_kernels_before_the_enum(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.finish()
    for types, offline in ((None, -257), ({"PG_buddy": 0x40000000, "PG_offline": 0x20000000}, ~0x20000000)):
        made = MadeBtf()
        made.enum("pageflags", {"PG_lru": 4})
        if types:
            made.enum("pagetype", types)
        evidence, _ = completed(kernel, tmp_path / "vmlinux", None, kernel.vmlinux(made.section()))
        assert evidence.info is not None
        assert evidence.info.number("PAGE_OFFLINE_MAPCOUNT_VALUE") == offline


def test_symbols_that_are_global_go_before_others(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.finish()
    linked = kernel.linked()
    odd = [
        ("U", "prb", 1),
        ("d", "prb", 2),
        ("D", "prb", 3),
        ("D", "prb", 4),
        ("d", "clear_seq", 5),
        ("d", "clear_seq", 6),
    ]
    at = next(address for _, name, address in linked if name == "linux_banner")
    path = tmp_path / "vmlinux"
    path.write_bytes(made_elf.vmlinux([*odd, *linked], (at, BANNER)))
    vmlinux = open_vmlinux(str(path))
    assert (vmlinux.address("prb"), vmlinux.address("clear_seq")) == (3, 5)
    assert vmlinux.build_id is None


def refused(path: Path) -> str:
    with pytest.raises(Error) as error:
        open_vmlinux(str(path))
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_files_that_are_no_vmlinux_are_refused_by_name(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.finish()
    sound = kernel.vmlinux()
    path = tmp_path / "file"
    assert refused(path) == "No such file or directory"
    assert refused(tmp_path).startswith("Is a directory")
    path.write_bytes(b"MZ\x90\0" + bytes(512))
    assert refused(path).startswith(
        "begins with b'MZ\\x90\\x00', expected the ELF file vmlinux (not bzImage or vmlinuz"
    )
    path.write_bytes(b"")
    assert refused(path).startswith("begins with b''")
    path.write_bytes(made_elf.elf([], machine=22))
    assert refused(path) == "ELF64 file for EM_S390, expected ELF64 for EM_X86_64"
    path.write_bytes(made_elf.elf([]))
    assert refused(path) == "has no symbol table, expected a vmlinux that is not stripped"
    path.write_bytes(made_elf.elf(made_elf.symbol_sections([("T", "main", 0x401000)], 1)))
    assert refused(path).startswith(
        "no symbol _stext or init_top_pgt or linux_banner, expected the vmlinux of an x86_64"
    )
    path.write_bytes(made_elf.elf(made_elf.symbol_sections(kernel.linked(), 1)))
    assert "where linux_banner should be; expected a whole vmlinux" in refused(path)
    path.write_bytes(sound.replace(BANNER, b"x" * len(BANNER)))
    assert refused(path).startswith("linux_banner is b'xxxx")
    path.write_bytes(kernel.vmlinux(btf=b"\x9f\xeb" + bytes(40)))
    assert refused(path).startswith("is cut or damaged: BTF: magic")


def test_a_cut_vmlinux_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    kernel = Dying()
    kernel.finish()
    sound = kernel.vmlinux()
    path = tmp_path / "vmlinux"
    for size in [*range(4, 200, 7), *range(200, len(sound), len(sound) // 40)]:
        path.write_bytes(sound[:size])
        refused(path)


def test_without_pyelftools_the_option_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("elftools"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Error, match="--vmlinux needs pyelftools: pip install oldmem"):
        Vmlinux(str(tmp_path), frozenset(), ())


SOURCE = """
#include <stddef.h>
#include <stdio.h>
typedef struct { long counter; } atomic_long_t;
enum pageflags { PG_lru = 5, PG_minus = -3 };
struct page {
    unsigned long flags;
    union { struct { void *lru; const int private; unsigned bit : 3; }; struct { atomic_long_t compound_head; }; };
    volatile int _mapcount[3][4];
    struct page *mapping;
};
struct page p; enum pageflags e; atomic_long_t t;
int main(void)
{
    printf("%zu %zu %zu %zu %zu %zu\\n", sizeof(p), offsetof(struct page, lru), offsetof(struct page, private),
           offsetof(struct page, compound_head), offsetof(struct page, _mapcount), offsetof(struct page, mapping));
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("version", ["4", "5"])
def test_dwarf_says_what_the_compiler_says(tmp_path: Path, version: str) -> None:
    from elftools.elf.elffile import ELFFile

    from guard.witness.dwarf import Dwarf

    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/crash_core.c").write_text(SOURCE)
    command = ["cc", "-g", f"-gdwarf-{version}", "kernel/crash_core.c", "-o", "program"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    numbers = subprocess.run([tmp_path / "program"], capture_output=True, check=True, timeout=10).stdout.split()
    names = ("lru", "private", "compound_head", "_mapcount", "mapping")
    with (tmp_path / "program").open("rb") as stream:
        types = Dwarf(ELFFile(stream), ["page", "pageflags", "atomic_long_t"])
        page = types.layout("page", (*names, "flags", "bit"))
        assert page is not None
        assert [page.size, *(page.members[name].offset for name in names)] == list(map(int, numbers))
        assert page.members["_mapcount"].length == 12
        assert page.members["_mapcount"].size == 48
        assert "bit" not in page.members
        assert types.enum("pageflags") == {"PG_lru": 5, "PG_minus": -3}
        assert types.layout("atomic_long_t", ("counter",)) == (8, {"counter": (0, 8, 1)})
        assert types.layout("nothing", ()) is None
        assert types.enum("page") is None


def test_the_modules_are_no_part_of_the_capture_path() -> None:
    code = "import sys; from capture.closure import closure; print('\\n'.join(closure()))"
    files = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "guard/witness/btf.py" in files
    for name in ("vmlinux", "made_note", "kaslr", "dwarf"):
        assert f"guard/witness/{name}.py" not in files
    assert "elftools" not in files


def test_every_name_that_is_looked_for_is_a_type_or_a_symbol() -> None:
    assert {"prb", "init_top_pgt", "__start_BTF", "mem_section"} <= made_note.SYMBOLS
    assert {"page", "atomic_long_t", "pagetype", "printk_info"} <= made_note.TYPES
    assert not {name for name in made_note.SYMBOLS | made_note.TYPES if " " in name or "." in name}
