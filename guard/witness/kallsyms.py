# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses of the dead kernel's symbols, from the kallsyms tables in its memory.

Tables: kernel/kallsyms.c and scripts/kallsyms.c. A name is a count (two bytes if above 127, since 6.1) and that many
token codes; expanded, the first character is the nm type letter. There are some 160000 names in 3 MB, so they are
streamed, and only those whose first two codes can begin a wanted name are looked at. The address tables have had four
forms since 4.6; which one stands here is told by SYMBOL(_stext) in vmcoreinfo, never by the kernel's version."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guard.errors import ReadError, WitnessError
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk
from guard.witness.vmcoreinfo import Vmcoreinfo

_CHUNK = 1 << 16
_MAX_SYMBOLS = 1 << 22
_MAX_NAMES_SIZE = 1 << 24
_MAX_CODES = 512
"""KSYM_NAME_LEN: no name, and so no token, is longer."""
_LONGEST = 2 + _MAX_CODES
_U64 = (1 << 64) - 1


class _Found:
    """One wanted symbol: its number in the tables, and whether its type letter says that it is global."""

    __slots__ = ("index", "is_global")

    def __init__(self, index: int, is_global: bool) -> None:
        self.index = index
        self.is_global = is_global


def lookup(walk: PageWalk, info: Vmcoreinfo, names: frozenset[str], problems: Problems) -> dict[str, int]:
    """Virtual addresses of those of *names* that the dead kernel has. Of several symbols with one name the first global
    one counts, else the first.

    Damage behind the start of the name table is told in *problems*, with what was found before it returned.
    Raises WitnessError if the tables are absent, not plausible, or contradict SYMBOL(_stext); ReadError if
    unreadable."""
    stext, num_syms_at = info.symbol("_stext"), info.symbol("kallsyms_num_syms")
    names_at = info.symbol("kallsyms_names")
    if stext is None or num_syms_at is None or names_at is None:
        raise WitnessError("vmcoreinfo has no SYMBOL of _stext, kallsyms_num_syms or kallsyms_names: no kallsyms")
    count = walk.read_u32(num_syms_at)
    if not 0 < count <= _MAX_SYMBOLS:
        raise WitnessError(f"kallsyms: {count} symbols at {num_syms_at:#x}, expected 1 to {_MAX_SYMBOLS}")
    scan = _NameScan(_tokens(walk, info), names | {"_stext"})
    scan.run(walk, names_at, count, problems)
    if "_stext" not in scan.found:
        raise WitnessError(f"kallsyms: no _stext among the names at {names_at:#x}")
    address_of = _address_rule(walk, info, scan.found["_stext"].index, stext)
    addresses: dict[str, int] = {}
    for name, found in scan.found.items():
        if name in names:
            try:
                addresses[name] = address_of(found.index)
            except (WitnessError, ReadError) as error:
                problems.note(f"kallsyms: the address of {name} cannot be read, left out: {error}")
    return addresses


def _tokens(walk: PageWalk, info: Vmcoreinfo) -> list[bytes]:
    table_at, index_at = info.symbol("kallsyms_token_table"), info.symbol("kallsyms_token_index")
    if table_at is None or index_at is None:
        raise WitnessError("vmcoreinfo has no SYMBOL of kallsyms_token_table or kallsyms_token_index: no kallsyms")
    raw = walk.read(index_at, 512)
    starts = [int.from_bytes(raw[i : i + 2], "little") for i in range(0, 512, 2)]
    last = max(starts)
    table = walk.read(table_at, last) + walk.read_cstring(table_at + last, _MAX_CODES) + b"\0"
    tokens = [table[start : table.index(0, start)] for start in starts]
    if max(map(len, tokens)) > _MAX_CODES:
        raise WitnessError(f"kallsyms: a token at {table_at:#x} is longer than {_MAX_CODES} bytes")
    return tokens


class _NameScan:
    """One pass over the compressed names, remembering the wanted ones."""

    __slots__ = ("_first", "_missing", "_pairs", "_prefixes", "_tokens", "_wanted", "found")

    def __init__(self, tokens: list[bytes], names: frozenset[str]) -> None:
        self._tokens = tokens
        self._wanted = {name.encode(): name for name in names}
        self._prefixes = {name[:end] for name in self._wanted for end in range(len(name) + 1)}
        self._missing = len(names)
        self.found: dict[str, _Found] = {}
        # Which first code, and which first two, can begin "<type letter><wanted name>". Codes that the kernel does not
        # use have empty tokens: they begin nothing.
        self._first = bytes(token[:1].isalpha() and self._possible(token) for token in tokens)
        self._pairs = {
            bytes((a, b))
            for a, token in enumerate(tokens)
            if self._first[a]
            for b, after in enumerate(tokens)
            if after and self._possible(token + after)
        }

    def _possible(self, text: bytes) -> bool:
        return text[1:] in self._prefixes

    def run(self, walk: PageWalk, vaddr: int, count: int, problems: Problems) -> None:
        """Scan *count* names at *vaddr*; stops early when every wanted name was seen as a global symbol."""
        first, pairs = self._first, self._pairs
        chunks = _chunks(walk, vaddr)
        buffer, at, index, end = b"", 0, 0, ""
        while index < count and self._missing:
            if not end:
                try:
                    buffer = buffer[at:] + next(chunks)
                except StopIteration:
                    buffer, end = buffer[at:] + bytes(_LONGEST), f"they take over {_MAX_NAMES_SIZE} bytes"
                except (WitnessError, ReadError) as error:
                    buffer, end = buffer[at:] + bytes(_LONGEST), str(error)
                at = 0
            # A name that begins before `safe` is whole; after the last chunk padding stands in for the next one.
            safe = len(buffer) - _LONGEST
            limit = safe if end else len(buffer)
            while at < safe and index < count:
                length = buffer[at]
                at += 1
                if length > 127:
                    length = length & 127 | buffer[at] << 7
                    at += 1
                if not 0 < length <= _MAX_CODES:
                    problems.note(f"kallsyms: symbol {index} of {count} has {length} codes, the rest is left out")
                    return
                if first[buffer[at]] and (buffer[at : at + 2] in pairs or length == 1) and at + length <= limit:
                    self._consider(index, buffer[at : at + length])
                    if not self._missing:
                        return
                at += length
                index += 1
            if end and index < count:
                problems.note(f"kallsyms: only {index} of {count} names at {vaddr:#x} can be read: {end}")
                return

    def _consider(self, index: int, codes: bytes) -> None:
        text = b""
        for code in codes:
            text += self._tokens[code]
            if not self._possible(text):
                return
        name = self._wanted.get(text[1:])
        if name is None:
            return
        known = self.found.get(name)
        is_global = text[:1].isupper()
        if known is None or (is_global and not known.is_global):
            self.found[name] = _Found(index, is_global)
            self._missing -= is_global


def _chunks(walk: PageWalk, vaddr: int) -> Iterator[bytes]:
    end = vaddr + _MAX_NAMES_SIZE
    while vaddr < end:
        size = _CHUNK - vaddr % _CHUNK
        try:
            data = walk.read(vaddr, size)
        except (WitnessError, ReadError):
            # The names may end before the chunk does, and what follows them need not be there.
            data = walk.read(vaddr, 4096 - vaddr % 4096)
        vaddr += len(data)
        yield data


def _address_rule(walk: PageWalk, info: Vmcoreinfo, stext_index: int, stext: int) -> Callable[[int], int]:
    """The rule by which symbol *stext_index* has the address *stext*."""
    rules: list[Callable[[int], int]] = []
    offsets_at, base_at = info.symbol("kallsyms_offsets"), info.symbol("kallsyms_relative_base")
    addresses_at = info.symbol("kallsyms_addresses")
    if offsets_at is not None:
        slots = offsets_at

        def offset(index: int) -> int:
            return int.from_bytes(walk.read(slots + 4 * index, 4), "little", signed=True)

        if base_at is not None:
            base = walk.read_u64(base_at)
            # 4.6 to 6.19: distance from kallsyms_relative_base.
            rules.append(lambda index: (base + (offset(index) & 0xFFFFFFFF)) & _U64)
            # 4.6 to 6.14, KALLSYMS_ABSOLUTE_PERCPU (x86_64 SMP): positive ones are addresses, negative ones distances.
            rules.append(lambda index: off if (off := offset(index)) >= 0 else (base - 1 - off) & _U64)
        # 7.0 and later (commit a081b5789255d): distance from the table slot itself.
        rules.append(lambda index: (slots + 4 * index + offset(index)) & _U64)
    if addresses_at is not None:
        # Until 6.10, without KALLSYMS_BASE_RELATIVE.
        rules.append(lambda index: walk.read_u64(addresses_at + 8 * index))
    for rule in rules:
        if rule(stext_index) == stext:
            return rule
    raise WitnessError(
        f"kallsyms: none of {len(rules)} address rules puts _stext at {stext:#x}, where vmcoreinfo has it"
    )
