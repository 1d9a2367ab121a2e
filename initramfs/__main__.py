# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m initramfs``: builds a capture initramfs from the command line. Exit status: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import argparse
import sys

from guard.errors import Error
from initramfs.builder import Builder
from initramfs.compress import METHODS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m initramfs",
        description="Build a small initramfs for the capture kernel, with oldmem and what it runs under.",
    )
    parser.add_argument("-o", "--output", metavar="OUT", help="file to write the image to")
    parser.add_argument("--kernel-modules", metavar="DIR", help="a folder as /lib/modules/RELEASE, for --module")
    parser.add_argument(
        "--module", metavar="NAME", action="append", default=[], help="kernel module to load (repeatable)"
    )
    parser.add_argument(
        "--collector", metavar="PATH", action="append", default=[], help="program to take in (repeatable)"
    )
    parser.add_argument(
        "--sysroot", metavar="DIR", help="take the collectors, with their libraries, from this folder tree"
    )
    parser.add_argument(
        "--busybox", metavar="PATH", default="busybox", help="busybox to take in (default: the one in PATH)"
    )
    parser.add_argument("--init", metavar="FILE", help="use this as /init")
    parser.add_argument("--run", metavar="COMMAND", help="shell command with which the default /init saves the dump")
    parser.add_argument(
        "--stage2",
        metavar="VMLINUZ",
        help="take in the capture kernel's own image, so that the default /init goes to stage 2 where it can",
    )
    parser.add_argument(
        "--add", metavar="SRC:DST", action="append", default=[], help="file or folder to add (repeatable)"
    )
    parser.add_argument("--python", metavar="PATH", help="interpreter to take in (default: the one this runs under)")
    parser.add_argument("--no-python", action="store_true", help="leave out the interpreter and oldmem itself")
    parser.add_argument("--compression", choices=METHODS, help="default: zstd where its tool is installed, else gzip")
    parser.add_argument("--level", type=int, metavar="N", help="compression level (default: smallest output)")
    parser.add_argument("--cache", metavar="DIR", help="folder to keep compiled modules in between builds")
    parser.add_argument("--size", action="store_true", help="print how large each part is, unpacked and compressed")
    parser.add_argument(
        "--list-files",
        metavar="DIR",
        help="for other builders: print 'image path, tab, file' of all that oldmem needs; generated files go under DIR",
    )
    return parser


def _usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.module and not options.kernel_modules:
        parser.error("--module needs --kernel-modules")
    if options.sysroot and not options.collector:
        parser.error("--sysroot needs --collector")
    if options.run is not None and options.init:
        parser.error("--run goes with the default /init, not with --init")
    if options.stage2 and options.no_python:
        parser.error("--stage2 is for oldmem, which --no-python leaves out")
    if not (options.output or options.size or options.list_files):
        parser.error("nothing to do: give -o, --size or --list-files")
    for pair in options.add:
        if not all(pair.rpartition(":")[::2]):
            parser.error(f"--add {pair}: not SRC:DST")


def _build(options: argparse.Namespace) -> Builder:
    builder = Builder(options.cache)
    if not options.no_python:
        builder.add_python(options.python)
    if not options.list_files:
        builder.add_busybox(options.busybox)
        builder.add_init(options.init, options.run)
        if options.stage2:
            builder.add_stage2(options.stage2)
    for collector in options.collector:
        builder.add_binary(collector, sysroot=options.sysroot)
    if options.module:
        builder.add_modules(options.kernel_modules, options.module)
    for pair in options.add:
        source, _, path = pair.rpartition(":")
        builder.add(path, source)
    return builder


def _print_sizes(builder: Builder, compression: str | None) -> None:
    print(f"{'part':<12}{'files':>7}{'unpacked MB':>14}{'packed MB':>12}")
    for line in builder.sizes(compression):
        print(f"{line.part:<12}{line.files:>7}{line.unpacked / 1e6:>14.2f}{line.packed / 1e6:>12.2f}")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    _usage(parser, options)
    try:
        builder = _build(options)
        if options.list_files:
            for path, source in builder.stage(options.list_files):
                print(f"{path}\t{source}")
        if options.size:
            _print_sizes(builder, options.compression)
        if options.output:
            builder.write(options.output, options.compression, options.level)
    except Error as error:
        print(f"initramfs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
