# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking up symbols in kallsyms tables of every form, and in tables that are damaged."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.errors import WitnessError
from guard.witness import kallsyms
from guard.witness.kallsyms import lookup
from guard.witness.memory import Problems
from guard.witness.pagewalk import x86_64
from tests.unit.witness_memory import RULES, DyingKernel, RandomMemory, Symbol

WORDS = (b"T_", b"Dio", b"mem", b"_res", b"crash", b"D", b"t__", b"per_cpu", b"source")


def look(kernel: DyingKernel, names: frozenset[str]) -> tuple[dict[str, int], Problems]:
    problems = Problems()
    info = kernel.info()
    return lookup(x86_64(kernel.mem, info), info, names, problems), problems


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("words", [(), WORDS])
def test_symbols_are_found_in_every_address_rule(rule: str, words: tuple[bytes, ...]) -> None:
    kernel = DyingKernel()
    where = {name: kernel.variable(name, bytes(8)) for name in ("iomem_resource", "crashk_res", "nr_cpu_ids")}
    kernel.finish(rule, words)
    found, problems = look(kernel, frozenset({*where, "_text", "absent"}))
    assert found == where | {"_text": kernel.text_vaddr}
    assert problems == []


def test_percpu_symbols_keep_their_absolute_address() -> None:
    kernel = DyingKernel()
    kernel.symbols.append(("A", "cpu_number", 0x1A0C8))
    kernel.finish("absolute percpu")
    assert look(kernel, frozenset({"cpu_number"}))[0] == {"cpu_number": 0x1A0C8}


names = st.text("abcdeimnorsu_0123456789.", min_size=1, max_size=300)
symbols_lists = st.lists(
    st.tuples(st.sampled_from("tTdDbBrRV"), names, st.integers(0, (1 << 30) - 1)), max_size=40, unique_by=lambda s: s[1]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    symbols=symbols_lists,
    rule=st.sampled_from(RULES),
    words=st.lists(st.text("TDdtabcdeimnorsu_", min_size=2, max_size=6), max_size=60),
    data=st.data(),
)
def test_random_symbols_come_back(symbols: list[Symbol], rule: str, words: list[str], data: st.DataObject) -> None:
    kernel = DyingKernel()
    here = [(kind, name, kernel.text_vaddr + at) for kind, name, at in symbols]
    kernel.symbols += here
    kernel.finish(rule, [word.encode() for word in words])
    wanted = data.draw(st.sets(st.sampled_from(here))) if here else set()
    found, problems = look(kernel, frozenset(name for _, name, _ in wanted))
    assert found == {name: address for _, name, address in wanted}
    assert problems == []


def test_of_several_symbols_with_one_name_the_global_one_counts_else_the_first() -> None:
    kernel = DyingKernel()
    base = kernel.text_vaddr
    kernel.symbols += [("d", "twice", base + 1), ("D", "twice", base + 2), ("D", "twice", base + 3)]
    kernel.symbols += [("d", "local", base + 4), ("b", "local", base + 5)]
    kernel.finish()
    assert look(kernel, frozenset({"twice", "local"}))[0] == {"twice": base + 2, "local": base + 4}


def test_a_name_that_is_one_code_as_a_whole_is_found() -> None:
    kernel = DyingKernel()
    kernel.symbols.append(("D", "lone", kernel.text_vaddr + 64))
    kernel.finish(words=[b"Dlone"])
    assert look(kernel, frozenset({"lone"}))[0] == {"lone": kernel.text_vaddr + 64}


def test_a_name_longer_than_127_codes_has_a_two_byte_length() -> None:
    kernel = DyingKernel()
    name = "a_very_long_name_" * 20
    kernel.symbols.append(("D", name, kernel.text_vaddr + 64))
    kernel.symbols.append(("D", "after", kernel.text_vaddr + 128))
    kernel.finish()
    assert look(kernel, frozenset({name, "after"}))[0] == {
        name: kernel.text_vaddr + 64,
        "after": kernel.text_vaddr + 128,
    }


def many_symbols(kernel: DyingKernel, count: int) -> list[Symbol]:
    rng = random.Random(1)
    words = ("crash", "cpu", "per", "res", "io", "mem", "dev", "get", "put", "page", "virtio", "net", "init", "x86")
    return [
        (rng.choice("tTdDbrR"), "_".join(rng.choices(words, k=3)) + f"_{i:x}", kernel.text_vaddr + 16 * i)
        for i in range(count)
    ]


def test_names_are_streamed_over_many_chunks() -> None:
    kernel = DyingKernel()
    kernel.symbols += many_symbols(kernel, 20000)
    last = kernel.text_vaddr + 0x1234560
    kernel.symbols.append(("D", "last_of_all", last))
    kernel.finish("place relative", WORDS)
    assert look(kernel, frozenset({"last_of_all"}))[0] == {"last_of_all": last}
    assert kernel.mem.reads < 200


def test_of_a_kernels_worth_of_names_only_the_wanted_ones_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = DyingKernel()
    symbols = many_symbols(kernel, 20000)
    kernel.symbols += symbols * 8
    kernel.finish("base relative", [b"crash_", b"cpu_", b"per_", b"virtio_", b"page_", b"_init", b"Tget_", b"tput_"])
    considered = 0
    consider = kallsyms._NameScan._consider

    def counting(scan: kallsyms._NameScan, index: int, codes: bytes) -> None:
        nonlocal considered
        considered += 1
        consider(scan, index, codes)

    monkeypatch.setattr(kallsyms._NameScan, "_consider", counting)
    look(kernel, frozenset({"iomem_resource", "crashk_res", "page_offset_base", "crash_notes", "__per_cpu_offset"}))
    assert 0 < considered < 80_000  # names made to be like the wanted ones


def test_names_that_end_at_the_end_of_memory_are_all_read() -> None:
    kernel = DyingKernel()
    kernel.symbols.append(("D", "last", kernel.text_vaddr + 64))
    kernel.finish()
    # Move the names alone to the end of a page with nothing readable behind it.
    at = int(kernel.keys["SYMBOL(kallsyms_names)"], 16)
    size = int(kernel.keys["SYMBOL(kallsyms_token_table)"], 16) - at
    data = kernel.mem.read(at - 0xFFFFFFFF80000000 + kernel.phys_base, size).rstrip(b"\0")
    new = kernel.text_vaddr + 0x800000 - len(data)
    kernel.write(new, data)
    kernel.keys["SYMBOL(kallsyms_names)"] = f"{new:x}"
    assert look(kernel, frozenset({"last"})) == ({"last": kernel.text_vaddr + 64}, [])


def test_what_stands_before_an_unreadable_page_of_names_is_found() -> None:
    kernel = DyingKernel()
    kernel.symbols.append(("D", "first", kernel.text_vaddr + 64))
    kernel.symbols += many_symbols(kernel, 20000)
    kernel.symbols.append(("D", "last", kernel.text_vaddr + 128))
    kernel.finish()
    kernel.mem.drop(int(kernel.keys["SYMBOL(kallsyms_names)"], 16) - 0xFFFFFFFF80000000 + kernel.phys_base + 0x30000)
    found, problems = look(kernel, frozenset({"first", "last"}))
    assert found == {"first": kernel.text_vaddr + 64}
    assert len(problems) == 1
    assert "can be read" in problems[0]


@pytest.mark.parametrize("key", ["num_syms", "names", "token_table", "token_index", "offsets"])
@pytest.mark.parametrize("value", ["0", "ffffffffbf000000", "dead000000000100", "ffff888fffff0000", "ffffffffffffffff"])
def test_tables_that_point_nowhere_are_a_clear_error(key: str, value: str) -> None:
    kernel = DyingKernel()
    kernel.finish()
    kernel.keys[f"SYMBOL(kallsyms_{key})"] = value
    before = kernel.mem.reads
    with pytest.raises(Exception, match=r"0x|kallsyms") as caught:
        look(kernel, frozenset({"_text"}))
    assert type(caught.value).__name__ in ("WitnessError", "ReadError")
    assert "\n" not in str(caught.value)
    assert kernel.mem.reads - before < 20


@pytest.mark.parametrize("key", ["num_syms", "names", "token_table", "token_index", "offsets"])
def test_absent_tables_are_a_clear_error(key: str) -> None:
    kernel = DyingKernel()
    kernel.finish()
    del kernel.keys[f"SYMBOL(kallsyms_{key})"]
    with pytest.raises(WitnessError, match="kallsyms"):
        look(kernel, frozenset({"_text"}))


def test_tables_that_contradict_vmcoreinfo_are_refused() -> None:
    kernel = DyingKernel()
    kernel.finish()
    kernel.keys["SYMBOL(_stext)"] = f"{kernel.text_vaddr + 0x1000:x}"
    with pytest.raises(WitnessError, match="none of 3 address rules"):
        look(kernel, frozenset({"_text"}))


@pytest.mark.parametrize("count", [0, (1 << 22) + 1, 0xFFFFFFFF])
def test_an_absurd_number_of_symbols_is_refused(count: int) -> None:
    kernel = DyingKernel()
    kernel.finish()
    kernel.write(int(kernel.keys["SYMBOL(kallsyms_num_syms)"], 16), struct.pack("<I", count))
    with pytest.raises(WitnessError, match=f"{count} symbols"):
        look(kernel, frozenset({"_text"}))


def test_more_symbols_than_names_ends_at_the_first_name_that_is_none() -> None:
    kernel = DyingKernel()
    kernel.finish()
    kernel.write(int(kernel.keys["SYMBOL(kallsyms_num_syms)"], 16), struct.pack("<I", 1 << 22))
    found, problems = look(kernel, frozenset({"_text", "absent"}))
    assert found == {"_text": kernel.text_vaddr}
    assert len(problems) == 1


@settings(max_examples=60, deadline=None)
@given(content=st.binary(min_size=600, max_size=4096))
def test_random_bytes_as_tables_end_quickly_with_an_error(content: bytes) -> None:
    kernel = DyingKernel()
    kernel.finish()
    mem = RandomMemory(content)
    info = kernel.info()
    with pytest.raises(WitnessError):
        lookup(x86_64(mem, info), info, frozenset({"_text"}), Problems())
    assert mem.reads < 1000


def test_names_without_end_are_cut_off() -> None:
    kernel = DyingKernel()
    kernel.finish()
    content = bytearray(b"\1\xff" * 2048)
    mem = RandomMemory(bytes(content))
    info = kernel.info()
    with pytest.raises(WitnessError):
        lookup(x86_64(mem, info), info, frozenset({"_text"}), Problems())
