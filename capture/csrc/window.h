/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reads of the vmcore inside of the collector: copies out of composed windows, which stay mapped for the next read. */
#ifndef OLDMEM_WINDOW_H
#define OLDMEM_WINDOW_H

#include "compose.h"

/*
 * Bytes copied from `offset` on: n, or fewer where the vmcore ends, where memory cannot be mapped, or where all windows
 * are in use: the rest is to be read from the file. To be called only when composer_ready() has said so. No lock is
 * taken: any number of threads, signal handlers and children of a fork may read at once.
 */
uint64_t window_read(const struct composer *c, uint64_t offset, void *buf, uint64_t n);

#endif
