# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel's own records, read from old memory as untrusted bytes through the gate that they help to build."""
