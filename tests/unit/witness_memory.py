# SPDX-License-Identifier: LGPL-2.1-or-later
"""Synthetic old memory for the witness tests: a fake guarded reader, x86_64 page tables, and a small dead kernel with
the records that the witness reads, written the way a kernel would have left them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

from guard.errors import ReadError
from guard.witness.vmcoreinfo import Vmcoreinfo

START_KERNEL_MAP = 0xFFFFFFFF80000000
VMEMMAP = 0xFFFFEA0000000000
POISONED_PAGE = struct.pack("<Q", 1 << 20) + bytes(56)
OFFLINE_PAGE = bytes(48) + struct.pack("<I", 0xF1000000) + bytes(12)
"""Struct pages with PG_hwpoison and with the type PageOffline, as memmap() lays them out."""
STRUCT_PAGE_KEYS = {
    "SIZE(page)": "64",
    "OFFSET(page.flags)": "0",
    "OFFSET(page.compound_head)": "8",
    "OFFSET(page._mapcount)": "48",
    "NUMBER(PG_hwpoison)": "20",
    "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)": "-251658240",
}
"""The layout of these in VMCOREINFO, by name."""
IMAGE_SIZE = 1 << 30
PAGE = 4096


class FakeMemory:
    """Physical memory in pages; pages never written are not readable. Counts what is asked of it."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.reads = 0
        self.bytes_read = 0

    def write(self, paddr: int, data: bytes) -> None:
        while data:
            number, at = divmod(paddr, PAGE)
            page = self.pages.setdefault(number, bytearray(PAGE))
            step = min(len(data), PAGE - at)
            page[at : at + step] = data[:step]
            paddr, data = paddr + step, data[step:]

    def drop(self, paddr: int) -> None:
        """Make the page at *paddr* unreadable."""
        self.pages.pop(paddr // PAGE, None)

    def read(self, paddr: int, size: int) -> bytes:
        assert paddr >= 0
        assert 0 < size <= 1 << 20, "the witness asks for small pieces only"
        self.reads += 1
        out = bytearray()
        while size:
            number, at = divmod(paddr, PAGE)
            if number not in self.pages:
                raise ReadError(f"no readable memory at {paddr:#x}", paddr)
            step = min(size, PAGE - at)
            out += self.pages[number][at : at + step]
            paddr, size = paddr + step, size - step
        self.bytes_read += len(out)
        return bytes(out)


class RandomMemory:
    """Every address is readable, and what stands there is *content* over and over, shifted from page to page."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.reads = 0

    def read(self, paddr: int, size: int) -> bytes:
        assert 0 < size <= 1 << 20
        self.reads += 1
        at = (paddr + paddr // PAGE * 8) % len(self.content)
        return (self.content * (size // len(self.content) + 2))[at : at + size]


class PageTables:
    """x86_64 page tables under construction, allocated upwards from *base*."""

    def __init__(self, mem: FakeMemory, base: int, levels: int, sme_mask: int = 0) -> None:
        self.mem = mem
        self.levels = levels
        self.sme_mask = sme_mask
        self._next = base
        self.root = self._table()

    def _table(self) -> int:
        paddr = self._next
        self._next += PAGE
        self.mem.write(paddr, bytes(PAGE))
        return paddr

    def map(self, vaddr: int, paddr: int, shift: int = 12, extra: int = 0) -> None:
        """Map the page of 2**shift bytes at *vaddr* to *paddr*, with *extra* bits set in the last entry."""
        table = self.root
        for level in range(12 + 9 * (self.levels - 1), shift, -9):
            slot = table + (vaddr >> level & 511) * 8
            entry = int.from_bytes(self.mem.read(slot, 8), "little")
            if not entry & 1:
                entry = self._table() | self.sme_mask | 0x63
                self.mem.write(slot, entry.to_bytes(8, "little"))
            table = entry & 0x000FFFFFFFFFF000 & ~self.sme_mask
        large = 0x80 if shift > 12 else 0
        last = paddr | self.sme_mask | 0x63 | large | extra | 1 << 63
        self.mem.write(table + (vaddr >> shift & 511) * 8, last.to_bytes(8, "little"))


Symbol = tuple[str, str, int]
"""Type letter, name, address."""


def tokens_for(symbols: Sequence[Symbol], words: Iterable[bytes] = ()) -> list[bytes]:
    """256 tokens: every character used, in its own place, and *words* in places that are free, the rest empty."""
    used = {ord(c) for kind, name, _ in symbols for c in kind + name}
    tokens = [bytes((code,)) if code in used else b"" for code in range(256)]
    free = [code for code in range(256) if code not in used]
    for word in dict.fromkeys(words):
        if len(word) > 1 and free:
            tokens[free.pop()] = word
    return tokens


def compress(text: bytes, by_length: Sequence[tuple[bytes, int]]) -> bytes:
    """*text* as token codes; *by_length* are tokens and codes, longest token first."""
    out = bytearray()
    while text:
        token, code = next(x for x in by_length if text.startswith(x[0]))
        out.append(code)
        text = text[len(token) :]
    return bytes(out)


def names_table(symbols: Sequence[Symbol], tokens: Sequence[bytes]) -> bytes:
    by_length = sorted(((token, code) for code, token in enumerate(tokens) if token), key=lambda x: -len(x[0]))
    done: dict[str, bytes] = {}
    out = bytearray()
    for kind, name, _ in symbols:
        text = kind + name
        codes = done[text] = done.get(text) or compress(text.encode(), by_length)
        length = len(codes)
        out += bytes((length,)) if length < 128 else bytes((length & 127 | 128, length >> 7))
        out += codes
    return bytes(out)


RULES = ("absolute", "base relative", "absolute percpu", "place relative")


class DyingKernel:
    """A small kernel: 1 GiB-mapped direct map at page_offset, its image at a KASLR offset, and an allocator for
    each."""

    def __init__(
        self,
        levels: int = 4,
        phys: int = 0x2000000,
        kaslr: int = 0x12000000,
        page_offset: int = 0xFFFF9A8040000000,
        sme_mask: int = 0,
    ) -> None:
        self.mem = FakeMemory()
        self.page_offset = page_offset
        self.text_vaddr = START_KERNEL_MAP + 0x1000000 + kaslr
        self.text_paddr = phys
        self.phys_base = phys - (self.text_vaddr - START_KERNEL_MAP)
        self._image = self.text_vaddr + PAGE
        self._heap = 0x10000000
        tables_at = phys + 0x4000000
        self.tables = PageTables(self.mem, tables_at, levels, sme_mask)
        for gib in range(2):
            self.tables.map(page_offset + (gib << 30), gib << 30, 30)
        self.symbols: list[Symbol] = [
            ("A", "fixed_percpu_data", 0),
            ("T", "_stext", self.text_vaddr),
            ("T", "_text", self.text_vaddr),
        ]
        self.keys: dict[str, str] = {
            "OSRELEASE": "6.12.0-test",
            "PAGESIZE": "4096",
            "SYMBOL(_stext)": f"{self.text_vaddr:x}",
            "SYMBOL(init_top_pgt)": f"{tables_at - self.phys_base + START_KERNEL_MAP:x}",
            "NUMBER(phys_base)": str(self.phys_base),
            "NUMBER(pgtable_l5_enabled)": str(int(levels == 5)),
            "NUMBER(sme_mask)": str(sme_mask),
            "NUMBER(KERNEL_IMAGE_SIZE)": str(IMAGE_SIZE),
            "KERNELOFFSET": f"{kaslr:x}",
        }

    def write(self, vaddr: int, data: bytes) -> None:
        """Write to an address that image() or heap() gave."""
        if vaddr >= START_KERNEL_MAP:
            self.mem.write(vaddr - START_KERNEL_MAP + self.phys_base, data)
        else:
            self.mem.write(vaddr - self.page_offset, data)

    def image(self, data: bytes, align: int = 16) -> int:
        """Put *data* into the kernel image."""
        vaddr = -(-self._image // align) * align
        self._image = vaddr + len(data)
        self.write(vaddr, data)
        return vaddr

    def heap(self, data: bytes, align: int = 64) -> int:
        """Put *data* into memory of the direct map."""
        paddr = -(-self._heap // align) * align
        self._heap = paddr + len(data)
        self.mem.write(paddr, data)
        return self.page_offset + paddr

    def variable(self, name: str, data: bytes, kind: str = "D") -> int:
        vaddr = self.image(data)
        self.symbols.append((kind, name, vaddr))
        return vaddr

    def pointer(self, name: str, value: int) -> int:
        return self.variable(name, value.to_bytes(8, "little"))

    def resource(self, start: int, end: int, name: int, flags: int, parent: int, sibling: int, child: int) -> bytes:
        return struct.pack("<8Q", start, end, name, flags, 0, parent, sibling, child)

    def iomem(self, tree: Sequence[tuple[int, int, str, int, list[object]]]) -> int:
        """Write a resource tree of (start, inclusive end, name, flags, children); returns the root's address."""
        root = self.variable("iomem_resource", bytes(64))

        def place(nodes: Sequence[object], parent: int) -> int:
            sibling = 0
            for node in reversed(nodes):
                assert isinstance(node, tuple)
                start, end, name, flags, children = node
                here = self.heap(bytes(64))
                text = self.heap(name.encode() + b"\0", 8)
                child = place(children, here)
                self.write(here, self.resource(start, end, text, flags, parent, sibling, child))
                sibling = here
            return sibling

        child = place(tree, root)
        self.write(root, self.resource(0, (1 << 46) - 1, self.image(b"PCI mem\0"), 0x200, 0, 0, child))
        return root

    def kallsyms(self, rule: str = "base relative", words: Iterable[bytes] = (), more: Sequence[Symbol] = ()) -> None:
        """Write the kallsyms tables of all symbols so far and *more*, with the given address rule."""
        symbols = [*self.symbols, *more]
        tokens = tokens_for(symbols, words)
        table, index = bytearray(), bytearray()
        for token in tokens:
            index += struct.pack("<H", len(table))
            table += token + b"\0"
        at = {
            "num_syms": self.image(struct.pack("<I", len(symbols))),
            "names": self.image(names_table(symbols, tokens)),
            "token_table": self.image(bytes(table)),
            "token_index": self.image(bytes(index)),
        }
        base = self.text_vaddr
        if rule == "absolute":
            at["addresses"] = self.image(struct.pack(f"<{len(symbols)}Q", *(a for _, _, a in symbols)))
        else:
            slots = self.image(bytes(4 * len(symbols)))
            encode: dict[str, Callable[[int, int], int]] = {
                "base relative": lambda i, a: (a - base) & 0xFFFFFFFF,
                "absolute percpu": lambda i, a: (a if a < base else base - 1 - a) & 0xFFFFFFFF,
                "place relative": lambda i, a: (a - slots - 4 * i) & 0xFFFFFFFF,
            }
            offsets = [encode[rule](i, a) for i, (_, _, a) in enumerate(symbols)]
            self.write(slots, struct.pack(f"<{len(symbols)}I", *offsets))
            at["offsets"] = slots
            if rule != "place relative":
                at["relative_base"] = self.image(struct.pack("<Q", base))
        self.keys |= {f"SYMBOL(kallsyms_{key})": f"{vaddr:x}" for key, vaddr in at.items()}

    def per_cpu_notes(self, notes: Sequence[bytes | None], base: int = 0x1A000, vmalloc: int = 0) -> list[int]:
        """crash_notes of CPUs 0.. with these bytes, None for a CPU that is not possible; returns physical addresses.
        The per-cpu areas are mapped page by page from *vmalloc* on if that is given."""
        offsets, paddrs, mask = [], [], 0
        for cpu, data in enumerate(notes):
            if data is None:
                offsets.append(0)
                continue
            mask |= 1 << cpu
            paddr = self.heap(data.ljust(512, b"\0"), 4096) - self.page_offset
            vaddr = self.page_offset + paddr
            if vmalloc:
                vaddr = vmalloc + cpu * 0x10000
                self.tables.map(vaddr, paddr)
            offsets.append((vaddr - base) & (1 << 64) - 1)
            paddrs.append(paddr)
        self.pointer("crash_notes", base)
        self.variable("__per_cpu_offset", struct.pack(f"<{len(offsets)}Q", *offsets))
        self.variable("__cpu_possible_mask", mask.to_bytes(1024, "little"))
        self.variable("nr_cpu_ids", struct.pack("<I", len(notes)))
        return paddrs

    def sections(
        self,
        states: dict[int, int],
        extreme: bool = True,
        section_bits: int = 27,
        size: int = 32,
        by_value: bool = True,
    ) -> None:
        """mem_section with these low bits of section_mem_map by section number, others not there. *by_value*: the
        symbol is the array of roots, as kernels print it, not the variable that points to it."""
        memory_bits = 46 if extreme else 34
        count = 1 << (memory_bits - section_bits)
        per_root = PAGE // size
        if extreme:
            roots: dict[int, bytearray] = {}
            for number, state in states.items():
                root = roots.setdefault(number // per_root, bytearray(per_root * size))
                struct.pack_into("<Q", root, number % per_root * size, 0xFFFFEA0000000000 | state)
            array = bytearray(8 * -(-count // per_root))
            for number, root in roots.items():
                struct.pack_into("<Q", array, 8 * number, self.heap(bytes(root), 4096))
            at = self.heap(bytes(array), 4096)
            if not by_value:
                at = self.pointer("mem_section", at)
            length = -(-count // per_root)
        else:
            flat = bytearray(count * size)
            for number, state in states.items():
                struct.pack_into("<Q", flat, number * size, 0xFFFFEA0000000000 | state)
            at, length = self.variable("mem_section", bytes(flat)), count
        self.keys |= {
            "SYMBOL(mem_section)": f"{at:x}",
            "LENGTH(mem_section)": str(length),
            "SIZE(mem_section)": str(size),
            "OFFSET(mem_section.section_mem_map)": "0",
            "NUMBER(SECTION_SIZE_BITS)": str(section_bits),
            "NUMBER(MAX_PHYSMEM_BITS)": str(memory_bits),
        }

    def memmap(self, numbers: Iterable[int], marked: Mapping[int, bytes] | None = None, size: int = 64) -> None:
        """Struct pages of sections of 128 MiB with these *numbers*: zeros, but for the pages from each pfn on that are
        *marked*, with these bytes. Sections without any share one piece of memory."""
        zeros = self.heap(bytes(1 << 21), 1 << 21) - self.page_offset
        for number in numbers:
            paddr = zeros
            ours = {pfn: pages for pfn, pages in (marked or {}).items() if pfn >> 15 == number}
            if ours:
                paddr = self.heap(bytes(1 << 21), 1 << 21) - self.page_offset
                for pfn, pages in ours.items():
                    self.mem.write(paddr + (pfn & 0x7FFF) * size, pages)
            self.tables.map(VMEMMAP + (number << 15) * size, paddr, 21)
        self.keys |= {
            "SYMBOL(vmemmap)": f"{VMEMMAP:x}",
            "SIZE(page)": str(size),
            "OFFSET(page.flags)": "0",
            "OFFSET(page.compound_head)": "8",
            "OFFSET(page._mapcount)": "48",
            "NUMBER(PG_hwpoison)": "20",
            "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)": "-251658240",
            "OFFSET(page.mapping)": "24",
            "OFFSET(page.private)": "40",
            "OFFSET(page._refcount)": "52",
            "NUMBER(PG_lru)": "5",
            "NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)": "-184549376",
            "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)": "-268435456",
            "NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)": "-201326592",
        }

    def uts(self, release: str) -> None:
        """init_uts_ns with this release."""
        name = b"".join(text.encode().ljust(65, b"\0") for text in ("Linux", "node", release, "#1 SMP", "x86_64", ""))
        self.keys["SYMBOL(init_uts_ns)"] = f"{self.image(bytes(8) + name):x}"
        self.keys["OFFSET(uts_namespace.name)"] = "8"

    def finish(self, rule: str = "base relative", words: Iterable[bytes] = ()) -> Vmcoreinfo:
        """Write _end and kallsyms, and give the vmcoreinfo of it all."""
        self.symbols.append(("B", "_end", self.text_vaddr + 0x5000000))
        self.kallsyms(rule, words)
        return self.info()

    def info(self) -> Vmcoreinfo:
        return Vmcoreinfo("".join(f"{key}={value}\n" for key, value in self.keys.items()).encode())


def elf_note(name: bytes, kind: int, desc: bytes) -> bytes:
    """One ELF note, name and text padded to 4 bytes."""
    padded = name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)
    return struct.pack("<III", len(name), len(desc), kind) + padded


def vmcoreinfo_note(desc: bytes) -> bytes:
    """A VMCOREINFO note as it stands in memory, with the empty note behind it."""
    return elf_note(b"VMCOREINFO\0", 0, desc) + bytes(12)


PRSTATUS = elf_note(b"CORE\0", 1, bytes(range(256)) + bytes(80))
"""What crash_save_cpu() writes on x86_64: 356 bytes."""
