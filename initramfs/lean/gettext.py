# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image's gettext, in place of the standard library's: argparse asks it for each of its messages, of which no
catalog exists. The real one comes with locale, 70 KB together."""

from __future__ import annotations


def gettext(message: str) -> str:
    return message


def ngettext(singular: str, plural: str, n: int) -> str:
    return singular if n == 1 else plural
