/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reads of the vmcore inside of the collector: copies out of composed windows, which stay mapped for the next read. */
#ifndef OLDMEM_WINDOW_H
#define OLDMEM_WINDOW_H

#include "compose.h"

/*
 * Bytes read at offset: n, fewer only at the end of the vmcore, or -errno. Pages that are refused or cannot be had are
 * zeros. Any number of threads may read at once.
 */
int64_t window_read(struct composer *c, uint64_t offset, void *buf, uint64_t n);

#endif
