# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel modules: found by name, ordered by dependency, decompressed; on trees made of the smallest possible .ko
files."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import Error
from initramfs.kmod import ModuleTree


def ko(modinfo: bytes | None, order: str = "<") -> bytes:
    """A relocatable ELF64 file with a string table and, unless None, a .modinfo section."""
    names = b"\0.shstrtab\0.modinfo\0"
    body = names + (modinfo or b"")
    sections = [(0, 0, 0, 0), (1, 3, 64, len(names))]
    if modinfo is not None:
        sections.append((11, 1, 64 + len(names), len(modinfo)))
    ident = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + b"\x01" + bytes(9)
    header = ident + struct.pack(
        f"{order}HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(sections), 1
    )
    table = b"".join(struct.pack(f"{order}IIQQQQIIQQ", n, k, 0, 0, at, size, 0, 0, 0, 0) for n, k, at, size in sections)
    return header + body + table


def info(depends: str = "", *more: str) -> bytes:
    return b"\0".join(item.encode() for item in ("license=GPL", f"depends={depends}", *more)) + b"\0"


def make_tree(root: Path, modules: dict[str, bytes], builtin: str = "") -> Path:
    tree = root / "lib" / "modules" / "6.12.0-test"
    for path, data in modules.items():
        file = tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tree / "modules.builtin").write_text(builtin)
    return tree


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd tool")
def test_dependencies_come_first_and_everything_comes_uncompressed(tmp_path: Path) -> None:
    plain = {"a": ko(info("b,c-d")), "b": ko(info("e")), "c-d": ko(info("e"), ">"), "e": ko(info())}
    tree = make_tree(
        tmp_path,
        {
            "kernel/fs/a.ko.xz": lzma.compress(plain["a"]),
            "kernel/drivers/b.ko.gz": gzip.compress(plain["b"]),
            "kernel/c-d.ko.zst": zstd(plain["c-d"]),
            "kernel/e.ko": plain["e"],
            "kernel/unrelated.ko": b"never read",
        },
    )
    order = ModuleTree(str(tree)).load_order(["a"])
    assert [(module.name, module.path) for module in order] == [
        ("e", "kernel/e.ko"),
        ("b", "kernel/drivers/b.ko"),
        ("c_d", "kernel/c-d.ko"),
        ("a", "kernel/fs/a.ko"),
    ]
    assert [module.data for module in order] == [plain["e"], plain["b"], plain["c-d"], plain["a"]]


def test_names_may_be_written_with_dash_or_underscore_and_a_root_will_do_for_a_tree(tmp_path: Path) -> None:
    make_tree(tmp_path, {"kernel/virtio_mem.ko": ko(info())})
    tree = ModuleTree(str(tmp_path))
    assert tree.release == "6.12.0-test"
    assert [module.name for module in tree.load_order(["virtio-mem", "virtio_mem"])] == ["virtio_mem"]


def test_what_is_built_in_needs_no_loading(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"kernel/a.ko": ko(info("virtio"))}, "kernel/fs/fuse/fuse.ko\nkernel/virtio/virtio.ko\n")
    assert [module.name for module in ModuleTree(str(tree)).load_order(["fuse", "a"])] == ["a"]


def test_soft_dependencies_are_taken_where_they_exist(tmp_path: Path) -> None:
    soft = "softdep=pre: crc32c nothere post: later"
    tree = make_tree(
        tmp_path, {"kernel/a.ko": ko(info("", soft)), "kernel/crc32c.ko": ko(info()), "kernel/later.ko": ko(info())}
    )
    assert [module.name for module in ModuleTree(str(tree)).load_order(["a"])] == ["crc32c", "a"]


def test_updates_go_before_the_kernels_own(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"kernel/a.ko": ko(info()), "updates/dkms/a.ko": ko(info())})
    assert [module.path for module in ModuleTree(str(tree)).load_order(["a"])] == ["updates/dkms/a.ko"]


@pytest.mark.parametrize(
    ("names", "files", "message"),
    [
        (["vmxyz"], {}, r"module vmxyz is neither in \S+ nor built into that kernel"),
        (["a"], {"kernel/a.ko": ko(info("gone"))}, "module gone, which a depends on, is neither in"),
        (["a"], {"kernel/a.ko.xz": b"\xfd7zXZ\0torn"}, r"a\.ko\.xz: damaged: "),
        (["a"], {"kernel/a.ko": b"text"}, r"a\.ko: not an ELF file"),
        (["a"], {"kernel/a.ko": ko(None)}, r"a\.ko: not a kernel module: no \.modinfo section"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, names: list[str], files: dict[str, bytes], message: str) -> None:
    tree = make_tree(tmp_path, {"kernel/other.ko": ko(info()), **files})
    with pytest.raises(Error, match=message) as caught:
        ModuleTree(str(tree)).load_order(names)
    assert "\n" not in str(caught.value)


def test_a_folder_without_modules_and_a_root_with_two_kernels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Error, match="no kernel modules"):
        ModuleTree(str(tmp_path))
    tree = make_tree(tmp_path, {"kernel/a.ko": ko(info())})
    shutil.copytree(tree, tree.parent / "7.0.0-test")
    with pytest.raises(Error, match=r"6\.12\.0-test, 7\.0\.0-test"):
        ModuleTree(str(tmp_path))


graphs = st.lists(st.lists(st.integers(0, 11), max_size=4), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(graphs)
def test_order_holds_for_any_graph_and_cycles_end(graph: list[list[int]]) -> None:
    names = [f"m{i}" for i in range(len(graph))]
    edges = {name: [names[i % len(names)] for i in row] for name, row in zip(names, graph, strict=True)}

    def below(name: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges[name])
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo += edges[other]
        return seen

    with tempfile.TemporaryDirectory() as root:
        tree = make_tree(Path(root), {f"kernel/{name}.ko": ko(info(",".join(edges[name]))) for name in names})
        order = [module.name for module in ModuleTree(str(tree)).load_order([names[0]])]
    assert sorted(order) == sorted(below(names[0]) | {names[0]})
    for name in order:
        for other in edges[name]:
            assert order.index(other) < order.index(name) or name in below(other) | {other}
