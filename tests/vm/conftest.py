# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures that give VM tests their guests. A machine without QEMU, or without the packages' mirror, skips these tests
and says why; under CI (``CI=true``) that is a failure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from tests.vm.harness import FetchError, Guest, missing, prefetch

HERE = Path(__file__).resolve().parent


class MakeGuest(Protocol):
    """Boots a guest that ends with the test; parameters are those of :class:`Guest`."""

    def __call__(self, kernel: str = "6.12", **options: Any) -> Guest: ...


class MakeCrashedGuest(Protocol):
    """Boots a guest, runs *before_load*, loads the capture kernel, runs *after_load*, crashes the guest; it is at the
    capture kernel's shell then. *load* and *load_append* are the parameters of :meth:`Guest.load`, *options* those of
    :class:`Guest`."""

    def __call__(
        self,
        kernel: str = "6.12",
        *,
        load: Literal["s", "c"] = "s",
        load_append: str = "",
        before_load: Callable[[Guest], object] | None = None,
        after_load: Callable[[Guest], object] | None = None,
        **options: Any,
    ) -> Guest: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def vm_machine() -> None:
    """All that a guest needs is on this machine."""
    reason = missing()
    if reason is None:
        try:
            prefetch()
        except FetchError as error:
            reason = str(error)
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no guests: {reason}", pytrace=False)
        pytest.skip(f"no guests: {reason}")


@pytest.fixture
def guest(vm_machine: None) -> Iterator[MakeGuest]:
    with ExitStack() as stack:
        yield lambda kernel="6.12", **options: stack.enter_context(Guest(kernel, **options))


@pytest.fixture
def crashed_guest(guest: MakeGuest) -> MakeCrashedGuest:
    def make(
        kernel: str = "6.12",
        *,
        load: Literal["s", "c"] = "s",
        load_append: str = "",
        before_load: Callable[[Guest], object] | None = None,
        after_load: Callable[[Guest], object] | None = None,
        **options: Any,
    ) -> Guest:
        up = guest(kernel, **options)
        if before_load is not None:
            before_load(up)
        up.load(load, load_append)
        if after_load is not None:
            after_load(up)
        up.crash()
        return up

    return make
