# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reasons for not reading a page that come from the dead kernel's own records, one module each.

Each makes a :class:`guard.registry.Rule`, or none where its evidence is not there or not sound. Unlike a device that
does not answer, a record that is missing is no reason to lose memory: their trouble policy is RAM."""
