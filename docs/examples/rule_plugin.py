# SPDX-License-Identifier: LGPL-2.1-or-later
"""A rule plug-in: pages that the machine's service processor found broken, a physical address (hexadecimal) a line in
/etc/bad-pages. If that file cannot be read, nothing from 4 to 8 GiB is, where the old DIMMs are."""

import os

from guard import RangeSet, Rule, deny_rule, rule_plugin
from guard.plugins import Context

GIB = 1 << 30


@rule_plugin(trouble="not-ram", domain=(4 * GIB, 8 * GIB))
def bad_pages(context: Context) -> Rule:
    with open(os.path.join(context.root, "etc/bad-pages"), encoding="ascii") as file:
        pages = [int(line, 16) for line in file]
    broken = RangeSet((at, at + 1) for at in pages)
    return deny_rule("broken", broken, "the service processor found it broken", context.page_size)
