# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a capture kernel: the first virtio-mem device asked by bisection and block by block, in turn. A line each
round: requests, requests one by one, seconds, seconds one by one, blocks, runs."""

from __future__ import annotations

import time

from guard import virtio_mem

ROUNDS = 5


def main() -> None:
    device = virtio_mem.discover()[0]
    with virtio_mem.connect(device) as transport:
        config = virtio_mem.read_config(transport)
        for _ in range(ROUNDS):
            states, times = [], []
            for block_by_block in (False, True):
                start = time.monotonic()
                states.append(virtio_mem.query(transport, config, block_by_block=block_by_block))
                times.append(time.monotonic() - start)
            ours, single = states
            assert ours.bitmap == single.bitmap, "bisecting and asking one by one differ"
            print(ours.requests, single.requests, *times, config.blocks, len(ours.runs()))


if __name__ == "__main__":
    main()
