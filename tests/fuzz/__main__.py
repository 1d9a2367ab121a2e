# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m tests.fuzz [SECONDS | RUN]``: whole machines with flipped bits (tests/fuzz/whole_machine.py) for SECONDS,
others each time. Each kind of breach is told once, with the fewest flips that it takes; such a RUN can be given back.
Exit status: 0 the law held, 1 it did not."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tests.fuzz.whole_machine import Run, WholeMachine, parse, shrunk
from tests.image import field

SECONDS = 600.0


def kind(breach: str) -> str:
    """What *breach* is, whatever its addresses."""
    words = re.sub(r"(0x)?\b[0-9a-f]*\d[0-9a-f]*(-0x[0-9a-f]+)?", "N", breach)
    return re.sub(r"N(, N)*( and N more)?", "N", words)


class Campaign:
    def __init__(self, machine: WholeMachine) -> None:
        self.machine = machine
        self.known: dict[str, int] = {}
        self.runs = 0

    def do(self, run: Run) -> None:
        self.runs += 1
        for breach in self.machine.breaches(run):
            name = kind(breach)
            self.known[name] = self.known.get(name, 0) + 1
            if self.known[name] == 1:
                fewest = shrunk(run, lambda r: name in map(kind, self.machine.breaches(r)))  # noqa: B023
                print(f"{fewest}: {'; '.join(self.machine.breaches(fewest))}", flush=True)


def main(argument: str = "") -> int:
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(WholeMachine(field.unpack(Path(folder))))
        if " " in argument:
            campaign.do(parse(argument))
        else:
            seed, seconds = time.time_ns(), float(argument or SECONDS)
            start, spent = time.monotonic(), time.process_time()
            while time.monotonic() - start < seconds:
                campaign.do(campaign.machine.run(Random(f"{seed} {campaign.runs}")))
            spent = time.process_time() - spent
            print(f"seed {seed}: {campaign.runs} runs, {campaign.runs / spent:.0f} in a second of processor time")
        campaign.machine.close()
    for name, count in sorted(campaign.known.items(), key=lambda item: -item[1]):
        print(f"{count} times: {name}")
    return 1 if campaign.known else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
