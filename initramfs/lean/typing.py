# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image's typing, in place of the standard library's, which is the largest of its modules: 105 KB, of which a
program that is not being checked needs NamedTuple and names to stand in annotations."""

from __future__ import annotations

import collections
import sys

TYPE_CHECKING = False
_OF_EVERY_CLASS = {"__module__", "__qualname__", "__annotations__", "__dict__", "__weakref__", "__classcell__"}


class _Form:
    """Any name that an annotation can have: takes part in whatever is said of types, and says nothing."""

    def __getitem__(self, _parameters: object) -> _Form:
        return self

    def __call__(self, *_arguments: object, **_more: object) -> _Form:
        return self

    def __or__(self, _other: object) -> _Form:
        return self

    __ror__ = __or__

    def __mro_entries__(self, _bases: object) -> tuple[type, ...]:
        return ()


def __getattr__(name: str) -> _Form:
    if name.startswith("__"):
        raise AttributeError(name)
    return _FORM


_FORM = _Form()


def cast(_type: object, value: object) -> object:
    return value


def overload(function: object) -> object:
    return function


final = override = runtime_checkable = no_type_check = overload


class _NamedTupleMeta(type):
    def __new__(mcs, name: str, _bases: object, namespace: dict[str, object]) -> type:
        fields = list(namespace.get("__annotations__", ()))
        defaults = [namespace[field] for field in fields if field in namespace]
        made = collections.namedtuple(name, fields, defaults=defaults, module=namespace["__module__"])
        for key, value in namespace.items():
            if key not in _OF_EVERY_CLASS and key not in fields:
                setattr(made, key, value)
        made.__annotations__ = namespace.get("__annotations__", {})
        made.__qualname__ = namespace["__qualname__"]
        return made


def NamedTuple(name: str, fields: list[tuple[str, object]]) -> type:
    return collections.namedtuple(name, [field for field, _ in fields], module=sys._getframe(1).f_globals["__name__"])


NamedTuple.__mro_entries__ = lambda _bases: (type.__new__(_NamedTupleMeta, "NamedTuple", (), {}),)
