# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VMCOREINFO made from a vmlinux, where the dead kernel's own note is missing or cut.

The lines are those that kernel/vmcore_info.c, kernel/printk/printk.c (log_buf_vmcoreinfo_setup) and
arch/x86/kernel/vmcore_info_64.c write, by any kernel since 6.1: each that the vmlinux has the symbol, the member or the
enumerator for. So the witness, makedumpfile, crash and drgn read the same from it as from the kernel's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

from guard.errors import ReadError, WitnessError
from guard.ranges import RangeSet
from guard.witness.dead_kernel import WANTED
from guard.witness.kaslr import MAX_PADDR, Place, locate
from guard.witness.memory import Memory, Problems
from guard.witness.pagewalk import START_KERNEL_MAP
from guard.witness.vmcoreinfo import Vmcoreinfo, note_of
from guard.witness.vmlinux import Types, Vmlinux

T = TypeVar("T")

PAGE_SIZE = 4096
SECTION_SIZE_BITS = 27
MAX_PHYSMEM_BITS = {4: 46, 5: 52}
"""arch/x86/include/asm/sparsemem.h, by page table levels."""
VMEMMAP = {4: 0xFFFFEA0000000000, 5: 0xFFD4000000000000}
VMALLOC_START = {4: 0xFFFFC90000000000, 5: 0xFFA0000000000000}
"""arch/x86/include/asm/pgtable_64_types.h, where there are no variables vmemmap_base and vmalloc_base."""

# "name" is SYMBOL(name); "type.member" OFFSET, "sizeof type" SIZE, "length type.member" LENGTH, in the kernel's order
_LOG = (
    *("prb", "printk_rb_static", "clear_seq", "sizeof printk_ringbuffer", "printk_ringbuffer.desc_ring"),
    *("printk_ringbuffer.text_data_ring", "printk_ringbuffer.fail", "sizeof prb_desc_ring"),
    *("prb_desc_ring.count_bits", "prb_desc_ring.descs", "prb_desc_ring.infos", "prb_desc_ring.head_id"),
    *("prb_desc_ring.tail_id", "sizeof prb_desc", "prb_desc.state_var", "prb_desc.text_blk_lpos"),
    *("sizeof prb_data_blk_lpos", "prb_data_blk_lpos.begin", "prb_data_blk_lpos.next", "sizeof printk_info"),
    *("printk_info.seq", "printk_info.ts_nsec", "printk_info.text_len", "printk_info.caller_id"),
    *("printk_info.dev_info", "sizeof dev_printk_info", "dev_printk_info.subsystem", "dev_printk_info.device"),
    *("sizeof prb_data_ring", "prb_data_ring.size_bits", "prb_data_ring.data", "prb_data_ring.head_lpos"),
    *("prb_data_ring.tail_lpos", "sizeof atomic_long_t", "atomic_long_t.counter", "sizeof latched_seq"),
    "latched_seq.val",
)
_KEYS = (
    *("init_uts_ns", "uts_namespace.name", "_stext", "vmap_area_list", "mem_map", "contig_page_data"),
    *("sizeof mem_section", "mem_section.section_mem_map", "sizeof page", "sizeof pglist_data", "sizeof zone"),
    *("sizeof free_area", "sizeof list_head", "sizeof nodemask_t", "page.flags", "page._refcount", "page.mapping"),
    *("page.lru", "page._mapcount", "page.private", "page.compound_dtor", "page.compound_order"),
    *("page.compound_head", "page.compound_info", "pglist_data.node_zones", "pglist_data.nr_zones"),
    *("pglist_data.node_start_pfn", "pglist_data.node_spanned_pages", "pglist_data.node_id", "zone.free_area"),
    *("zone.vm_stat", "zone.spanned_pages", "free_area.free_list", "list_head.next", "list_head.prev"),
    *("vmap_area.va_start", "vmap_area.list", "length zone.free_area", *_LOG, "length free_area.free_list"),
    *("kallsyms_names", "kallsyms_num_syms", "kallsyms_token_table", "kallsyms_token_index", "kallsyms_offsets"),
    *("kallsyms_relative_base", "kallsyms_addresses", "init_top_pgt", "node_data"),
)
_FLAGS = ("PG_lru", "PG_private", "PG_swapcache", "PG_swapbacked", "PG_slab", "PG_hwpoison")
_PAGE_TYPES = ("slab", "buddy", "hugetlb", "offline", "unaccepted")
# Before enum pagetype (6.11) the types were macros: include/linux/page-flags.h, 5.0 and later
_MACRO_TYPES = {"buddy": 0x80, "offline": 0x100}
_ENUMS = ("pageflags", "pagetype", "zone_stat_item", "node_states", "compound_dtor_id")
_VARIABLES = ("mem_section", "vmemmap_base", "vmalloc_base", "node_states", "kaslr_get_random_long")

# What the witness cannot do without; the last ones are the last that the kernel writes
_ESSENTIAL = (
    *("OSRELEASE", "PAGESIZE", "SYMBOL(_stext)", "SYMBOL(mem_section)", "SIZE(page)", "OFFSET(page.flags)"),
    *("NUMBER(phys_base)", "SYMBOL(init_top_pgt)", "NUMBER(pgtable_l5_enabled)", "KERNELOFFSET"),
    *("NUMBER(KERNEL_IMAGE_SIZE)", "NUMBER(sme_mask)"),
)

SYMBOLS = frozenset(WANTED | set(_VARIABLES) | {key for key in _KEYS if "." not in key and " " not in key})
TYPES = frozenset({key.split()[-1].partition(".")[0] for key in _KEYS if "." in key or " " in key} | set(_ENUMS))


class Evidence(NamedTuple):
    """What there is in the end: VMCOREINFO, and from a vmlinux that fits the virtual addresses of its symbols."""

    info: Vmcoreinfo | None
    symbols: dict[str, int] | None


def open_vmlinux(path: str) -> Vmlinux:
    """The vmlinux at *path*, with all that a note needs. Raises Error."""
    return Vmlinux(path, SYMBOLS, TYPES)


def complete(vmlinux: Vmlinux, info: Vmcoreinfo | None, mem: Memory, ranges: RangeSet, problems: Problems) -> Evidence:
    """*info*, the note that was found, with what it lacks made from *vmlinux*; the kernel is looked for in *ranges*
    (physical bytes). A vmlinux that does not fit is not used. Never raises: what is made, or why not, is a line in
    *problems*."""
    path = vmlinux.path
    try:
        if info is not None:
            _refuse_other_build(vmlinux, info)
        place = _place(vmlinux, info, mem, ranges, problems)
    except (WitnessError, ReadError) as error:
        problems.note(f"{path}: {error}; it is not used")
        return Evidence(info, None)
    symbols = {name: _moved(address, place) for name, (address, _) in vmlinux.symbols.items() if name in WANTED}
    if info is not None and not info.problems and all(key in info.texts for key in _ESSENTIAL):
        return Evidence(info, symbols)
    lines = dict(info.texts) if info else {}
    made = {key: value for key, value in _lines(vmlinux, place, mem, problems) if key not in lines}
    desc = "".join(f"{key}={value}\n" for key, value in (lines | made).items()).encode()
    where = f"its kernel lies at {vmlinux.address('_stext') + place.shift:#x}, KASLR offset {place.offset:#x}"
    if info is None:
        problems.note(f"VMCOREINFO is made from {path}: {where}")
    else:
        for line in info.problems:
            problems.note(line)
        problems.note(f"{len(made)} lines that the VMCOREINFO note lacks are made from {path}: {where}")
    return Evidence(Vmcoreinfo(desc, note_of(desc)), symbols)


def _refuse_other_build(vmlinux: Vmlinux, info: Vmcoreinfo) -> None:
    for key, ours in (("BUILD-ID", vmlinux.build_id), ("OSRELEASE", vmlinux.release)):
        theirs = info.text(key)
        if ours is not None and theirs is not None:
            if ours != theirs:
                raise WitnessError(f"{key} is {ours}, the dead kernel's VMCOREINFO has {theirs}")
            return


def _place(vmlinux: Vmlinux, info: Vmcoreinfo | None, mem: Memory, ranges: RangeSet, problems: Problems) -> Place:
    offset = shift = None
    if info is not None:
        offset = info.address("KERNELOFFSET")
        stext, phys_base = info.symbol("_stext"), info.number("phys_base")
        if offset is None and stext is not None:
            offset = stext - vmlinux.address("_stext")
        if offset is not None and phys_base is not None:
            shift = phys_base - START_KERNEL_MAP + offset
    return locate(mem, ranges, vmlinux.landmarks, problems, shift, offset)


def _moved(address: int, place: Place) -> int:
    """Per-cpu symbols may be linked from 0 on, and are not moved with the image."""
    return address + place.offset if address >= START_KERNEL_MAP else address


def _lines(vmlinux: Vmlinux, place: Place, mem: Memory, problems: Problems) -> Iterator[tuple[str, str]]:
    """(key, value) of all lines."""
    yield "OSRELEASE", vmlinux.release
    if vmlinux.build_id:
        yield "BUILD-ID", vmlinux.build_id
    yield "PAGESIZE", str(PAGE_SIZE)
    yield "SYMBOL(swapper_pg_dir)", f"{_moved(vmlinux.address('init_top_pgt'), place):x}"  # a macro
    for key in _KEYS:
        if "." not in key and " " not in key and key in vmlinux.symbols:
            yield f"SYMBOL({key})", f"{_moved(vmlinux.address(key), place):x}"
    values = {name: _variable(vmlinux, name, place, mem, problems) for name in _VARIABLES[:3]}
    if values["mem_section"]:
        yield "SYMBOL(mem_section)", f"{values['mem_section']:x}"  # since 5.5 the pointer's value
    yield "SYMBOL(vmemmap)", f"{values['vmemmap_base'] or VMEMMAP[place.levels]:x}"
    yield "NUMBER(VMALLOC_START)", f"{values['vmalloc_base'] or VMALLOC_START[place.levels]:#x}"
    if vmlinux.types is None:
        problems.note(f"{vmlinux.path}: has neither .BTF nor .debug_info: offsets, sizes and flags are not known")
    else:
        yield from _layout_lines(vmlinux, vmlinux.types, place, problems)
        yield from _enum_lines(vmlinux, vmlinux.types, problems)
    yield "NUMBER(SECTION_SIZE_BITS)", str(SECTION_SIZE_BITS)
    yield "NUMBER(MAX_PHYSMEM_BITS)", str(MAX_PHYSMEM_BITS[place.levels])
    yield "NUMBER(phys_base)", str(place.phys_base)
    yield "NUMBER(pgtable_l5_enabled)", str(int(place.levels == 5))
    yield "KERNELOFFSET", f"{place.offset:x}"
    # CONFIG_RANDOMIZE_BASE doubles it (arch/x86/include/asm/page_64_types.h), and has this function
    yield "NUMBER(KERNEL_IMAGE_SIZE)", str(1 << 30 if "kaslr_get_random_long" in vmlinux.symbols else 1 << 29)
    yield "NUMBER(sme_mask)", str(place.sme_mask)


def _variable(vmlinux: Vmlinux, name: str, place: Place, mem: Memory, problems: Problems) -> int:
    """The 64-bit value of the dead kernel's variable *name*; 0 if there is none."""
    if name not in vmlinux.symbols:
        return 0
    paddr = vmlinux.address(name) + place.shift
    try:
        if not 0 <= paddr < MAX_PADDR:
            raise WitnessError(f"it would be at physical {paddr:#x}")
        return int.from_bytes(mem.read(paddr, 8), "little")
    except (WitnessError, ReadError) as error:
        problems.note(f"{name} of the dead kernel cannot be read: {error}")
        return 0


def _told(vmlinux: Vmlinux, what: str, ask: Callable[[], T | None], problems: Problems) -> T | None:
    """What *ask* says of a type; a damaged one is told, and as good as none."""
    try:
        return ask()
    except WitnessError as error:
        problems.note(f"{vmlinux.path}: {error}; lines on {what} are left out")
        return None


def _layout_lines(vmlinux: Vmlinux, types: Types, place: Place, problems: Problems) -> Iterator[tuple[str, str]]:
    wanted: dict[str, list[str]] = {}
    for key in _KEYS:
        if "." in key or " " in key:
            name, _, member = key.split()[-1].partition(".")
            wanted.setdefault(name, []).append(member)
    layouts = {
        name: _told(vmlinux, name, partial(types.layout, name, members), problems) for name, members in wanted.items()
    }
    for key in _KEYS:
        kind, _, what = key.rpartition(" ")
        name, _, member = what.partition(".")
        if (layout := layouts.get(name)) is None:
            continue
        if kind == "sizeof":
            yield f"SIZE({name})", str(layout.size)
        elif member in layout.members:
            place_of = layout.members[member]
            yield (f"LENGTH({what})", str(place_of.length)) if kind else (f"OFFSET({what})", str(place_of.offset))
    if device := layouts["dev_printk_info"]:
        for name, array in device.members.items():
            yield f"LENGTH(printk_info_{name})", str(array.length)
    if nodes := layouts["nodemask_t"]:
        yield "LENGTH(node_data)", str(nodes.size * 8)
        states = _told(vmlinux, "node_states", partial(types.enum, "node_states"), problems) or {}
        if "node_states" in vmlinux.symbols and "N_ONLINE" in states:
            at = _moved(vmlinux.address("node_states"), place) + states["N_ONLINE"] * nodes.size
            yield "SYMBOL(node_online_map)", f"{at:x}"
    section = layouts["mem_section"]
    if section and 0 < section.size <= PAGE_SIZE:
        # NR_SECTION_ROOTS: x86_64 always has SPARSEMEM_EXTREME
        per_root = PAGE_SIZE // section.size
        yield "LENGTH(mem_section)", str(-(-(1 << (MAX_PHYSMEM_BITS[place.levels] - SECTION_SIZE_BITS)) // per_root))


def _enum_lines(vmlinux: Vmlinux, asked: Types, problems: Problems) -> Iterator[tuple[str, str]]:
    enums = {name: _told(vmlinux, name, partial(asked.enum, name), problems) for name in _ENUMS}
    flags = enums["pageflags"] or {}
    for name in _FLAGS:
        if name in flags:
            yield f"NUMBER({name})", str(flags[name])
    if 0 <= flags.get("PG_head", -1) < 64:
        yield "NUMBER(PG_head_mask)", str(1 << flags["PG_head"])
    for name, enum in (("NR_FREE_PAGES", "zone_stat_item"), ("HUGETLB_PAGE_DTOR", "compound_dtor_id")):
        values = enums[enum] or {}
        if name in values:
            yield f"NUMBER({name})", str(values[name])
    types = enums["pagetype"]
    for name in _PAGE_TYPES:
        value = None
        if types is None:
            value = ~_MACRO_TYPES[name] if name in _MACRO_TYPES else None
        elif f"PGTY_{name}" in types:
            value = (types[f"PGTY_{name}"] << 24) - (1 << 32)  # an int
        elif f"PG_{name}" in types:
            value = ~types[f"PG_{name}"]  # 6.11
        if value is not None:
            yield f"NUMBER(PAGE_{name.upper()}_MAPCOUNT_VALUE)", str(value)
