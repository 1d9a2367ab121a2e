# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image's own typing does for the capture path what the standard library's does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAN = ROOT / "initramfs/lean"

TUPLES = """
import json, sys
from capture.closure import closure
import typing
closure()
found = {}
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] not in ("capture", "guard"):
        continue
    for key, value in sorted(vars(module).items()):
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
            own = sorted(k for k in vars(value) if not k.startswith("__") and k != "_field_defaults")
            defaults = {k: repr(v) for k, v in value._field_defaults.items()}
            base = value.__mro__[1].__name__
            found[f"{value.__module__}.{value.__qualname__}"] = [value._fields, defaults, own, base]
print(json.dumps([typing.__file__, found]))
"""


def run(code: str, *, lean: bool) -> str:
    path = ([str(LEAN)] if lean else []) + [str(ROOT)]
    head = f"import sys; sys.modules.pop('typing', None); sys.path[:0] = {path!r}\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", head + f"sys.path += {sys.path!r}\n" + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_named_tuple_of_the_capture_path_is_the_same() -> None:
    lean_file, lean = json.loads(run(TUPLES, lean=True))
    file, real = json.loads(run(TUPLES, lean=False))
    assert lean_file == str(LEAN / "typing.py") != file
    assert len(real) > 50
    assert lean == real


def test_plug_ins_may_annotate_with_whatever_they_like() -> None:
    code = """
import typing
from typing import Any, Callable, Generic, List, NamedTuple, Optional, Protocol, TypeVar, Union, overload
T = TypeVar("T", bound=int)
Maybe = Optional[Union[int, List[Callable[[int], None]]]] | None
class Box(Generic[T]): pass
class Reads(Protocol):
    def read(self, at: int) -> bytes: ...
class P(NamedTuple):
    x: int
    y: List[int] = []
    @property
    def sum(self) -> int: return self.x
p = P(3)
q = NamedTuple("Q", [("a", int)])
print(p.sum, p._replace(x=4), q(1), typing.cast(int, "s"), Box().__class__.__mro__[1].__name__)
"""
    assert run(code, lean=True) == run(code, lean=False).replace("Generic", "object")
    assert run(code, lean=True) == "3 P(x=4, y=[]) Q(a=1) s object\n"


def test_the_images_operator_has_all_that_the_real_one_has() -> None:
    code = """
import operator
print(sorted(n for n in dir(operator) if callable(getattr(operator, n)) and not n.startswith("__l")))
print(operator.itemgetter(1)("ab"), operator.__add__(1, 2), operator.attrgetter("real")(3), operator.index(5))
"""
    lean = run("import sys; sys.modules.pop('operator', None)\n" + code, lean=True).splitlines()
    real = run(code, lean=False).splitlines()
    assert lean[1] == real[1]
    assert set(eval(real[0])) - {"__package__"} <= set(eval(lean[0])) | {"_abs"}


def test_the_images_reprlib_ends_a_repr_that_comes_back_to_itself() -> None:
    code = """
import sys
for name in ("collections", "reprlib"):
    sys.modules.pop(name, None)
from collections import OrderedDict
d = OrderedDict(a=1)
d["self"] = d
print(d, OrderedDict(b=2))
"""
    assert run(code, lean=True) == run(code, lean=False)


def test_the_images_help_reads_as_ever() -> None:
    code = """
from capture.arguments import parser
import argparse
top = parser("1")
print(top.format_help())
for action in top._actions:
    if isinstance(action, argparse._SubParsersAction):
        for sub in action.choices.values():
            print(sub.format_help())
"""
    assert run(code, lean=True).split() == run(code, lean=False).split()
