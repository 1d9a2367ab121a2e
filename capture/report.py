# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a dump has to tell: the memory map, the virtio-mem devices, the guard's refusals; as text and as JSON values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

from capture.dump import Difference, Dump
from capture.losses import losses
from capture.memory_map import Device
from guard.procvmcore import PT_LOAD
from guard.ranges import Range, RangeSet


def bytes_text(n: int) -> str:
    """*n* bytes in the largest binary unit that keeps it exact enough to compare by eye."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if n >= size:
            return f"{n / size:.10g}{unit}" if n % size == 0 else f"{n / size:.2f}{unit}"
    return str(n)


def table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() + "\n" for r in lines)


# Items of a list in the reports that a server makes: it must not run out of memory over a fragmented machine
MOST_SERVED = 4096


def _pairs(ranges: Iterable[Range], most: int | None = None) -> list[list[int]]:
    return [[r.start, r.end] for r in islice(ranges, most)]


def map_text(dump: Dump) -> str:
    rows = [("range", "size", "kind", "read", "known from")]
    readable = 0
    for e in dump.map():
        verdict = f"no: {e.refused_by}" if e.refused_by else "yes" if e.shown else "no: no file shows it"
        readable += e.range.size if verdict == "yes" else 0
        rows.append((str(e.range), bytes_text(e.range.size), e.kind, verdict, ", ".join(e.known_from)))
    return table(rows) + f"readable: {bytes_text(readable)}, envelope from {dump.envelope.source}\n"


def map_json(dump: Dump, most: int | None = None) -> dict[str, Any]:
    """Half-open ranges, bytes. Of each list the first *most* items (None: all)."""
    return {
        "envelope_source": dump.envelope.source,
        "memory_source": dump.machine.source,
        "layout": dump.layout,
        "mode": dump.mode,
        "sources": {
            name: {
                "path": source.path,
                "available": source.available,
                "findings": [[f.start, f.end, f.kind, f.detail] for f in islice(source.findings, most)],
                "problems": list(source.problems),
            }
            for name, source in dump.machine.reports.items()
        },
        "entries": [
            {
                "start": e.range.start,
                "end": e.range.end,
                "kind": e.kind,
                "refused_by": e.refused_by or None,
                "shown": e.shown,
                "known_from": list(e.known_from),
            }
            for e in islice(dump.map(), most)
        ],
        "readable": _pairs(dump.readable_runs(), most),
        "readable_bytes": sum(r.size for r in dump.readable_runs()),
        "pt_load": [
            {"paddr": p.paddr, "vaddr": p.vaddr, "size": p.memsz, "offset": p.offset}
            for p in islice((p for p in dump.core.phdrs if p.type == PT_LOAD), most)
        ],
        "compatibility": _added(dump),
        "problems": list(dump.problems),
    }


def _added(dump: Dump) -> list[dict[str, str]]:
    """Lines of the served VMCOREINFO that are not the dead kernel's."""
    return [{"line": one.line, "for": one.whom} for one in dump.arch.added]


def compare_text(differences: list[Difference]) -> str:
    if not differences:
        return "the preloaded header and the memory map agree\n"
    rows = [(d.what, str(d.range), bytes_text(d.range.size), d.why) for d in differences]
    sums = {w: sum(d.range.size for d in differences if d.what == w) for w in ("missing", "too much")}
    total = (
        f"the preloaded header misses {bytes_text(sums['missing'])} and has {bytes_text(sums['too much'])} too much\n"
    )
    return table([("preloaded header", "range", "size", "why"), *rows]) + total


def device_json(device: Device, most: int | None = None) -> dict[str, Any]:
    """Half-open ranges, bytes; of the plugged ones the first *most* (None: all)."""
    return {
        "name": device.name,
        "addr": device.region.start,
        "region_size": device.region.size,
        "usable_region_size": device.usable,
        "block_size": device.block_size,
        "plugged_size": device.plugged_size,
        "requested_size": device.requested_size,
        "node_id": device.node_id,
        "plugged": None if device.bitmap is None else _pairs(device.plugged_runs(), most),
        "why": device.why,
        "gated_by_kernel": device.gated_by_kernel,
        "requests": device.requests,
        "problems": list(device.problems),
    }


def plug_text(devices: list[Device]) -> str:
    if not devices:
        return "no virtio-mem devices\n"
    rows = [("device", "region", "block", "plugged", "of", "runs", "asked")]
    for d in devices:
        plugged = d.plugged
        known = d.bitmap is not None
        rows.append(
            (
                d.name,
                str(d.region),
                bytes_text(d.block_size),
                bytes_text(plugged.size) if known else "unknown",
                bytes_text(d.region.size),
                str(len(plugged)) if known else "-",
                f"{d.requests} requests" if known and d.requests else d.why,
            )
        )
    return table(rows)


def _refusals(dump: Dump, most: int | None) -> dict[str, tuple[list[Range], int, int]]:
    """For each rule that refuses anything: its first *most* runs, how many there are, and their bytes."""
    found: dict[str, tuple[list[Range], int, int]] = {}
    spans = RangeSet((e.paddr, e.paddr + e.size) for e in dump.core.extents) | dump.envelope.all
    for span in spans.outer_pages(dump.machine.page_size):
        for run, rule in dump.registry.verdicts(*span):
            if rule:
                runs, count, size = found.get(rule.name, ([], 0, 0))
                if most is None or count < most:
                    runs.append(run)
                found[rule.name] = (runs, count + 1, size + run.size)
    return found


def guard_json(dump: Dump, most: int | None = None) -> dict[str, Any]:
    """What each rule refuses, what reads were refused, what could not be read: the report beside the vmcore. Half-open
    ranges, bytes; of each list the first *most* (None: all)."""
    counters = dump.registry.counters()
    refusals = _refusals(dump, most)
    rules = []
    for rule in dump.registry:
        runs, count, size = refusals.get(rule.name, ([], 0, 0))
        rules.append(
            {
                "name": rule.name,
                "reason": rule.reason,
                "trouble": rule.trouble,
                "refused": _pairs(runs),
                "refused_runs": count,
                "refused_bytes": size,
                "page_reads_refused": counters[rule.name],
                "troubled": _pairs(rule.troubled, most),
            }
        )
    memory = dump.memory
    return {
        "rules": rules,
        "bytes_read": memory.bytes_read,
        "bytes_refused": memory.bytes_refused,
        "unreadable": [
            {"start": f.range.start, "end": f.range.end, "why": os.strerror(f.errno)} for f in memory.faults()
        ],
        "unlisted_faults": memory.unlisted_faults,
        "lost": [{"start": r.start, "end": r.end, "why": why} for r, why in islice(losses(dump), most)],
        "late_dumps": dump.machine.late_dumps(),
        "devices": [device_json(d, most) for d in dump.machine.devices],
        "compatibility": _added(dump),
        "problems": list(dump.problems),
    }


def as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
