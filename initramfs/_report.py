# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside the interpreter being packed, with -S: asks the program which files it is made of, prints them as a
Python literal.

Arguments: sys.path to use. Nothing but sys may be imported before the program answers, or it would be counted in."""

from __future__ import annotations

import sys


def _modules() -> dict[str, tuple[str, bool, bool]]:
    found = {}
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        file = getattr(module, "__file__", None)
        # Taken by the spec's name: os.path and the like are other modules under a second name.
        if spec is not None and isinstance(file, str):
            found[spec.name] = (file, spec.origin == "frozen", spec.submodule_search_locations is not None)
    return found


def main() -> int:
    sys.path[:] = sys.argv[1:]
    startup = _modules()
    try:
        from capture.closure import closure

        reported = closure()
    except Exception as error:  # whatever fails in there, the user gets one line of it
        sys.stderr.write(f"capture.closure: {type(error).__name__}: {error}\n")
        return 1
    wanted = {file for file, _, _ in startup.values()} | set(reported)
    wanted.discard(__file__)  # in sys.modules as __main__
    modules = [(name, *facts) for name, facts in sorted(_modules().items()) if facts[0] in wanted]
    data = sorted(wanted - {facts[1] for facts in modules})
    print(repr({"modules": modules, "data": data}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
