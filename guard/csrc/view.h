/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A file that does not exist: literal bytes first, then extents of old memory, zeros wherever nothing is laid.
 * This is the shape of a vmcore, and the one thing that FUSE, copy and callers read from.
 */
#ifndef OLDMEM_VIEW_H
#define OLDMEM_VIEW_H

#include "physmem.h"

struct view_extent {
	uint64_t offset, size;	/* bytes in the file */
	uint64_t paddr;		/* of its first byte */
};

struct view {
	const uint8_t *head;
	uint64_t head_size;
	size_t n;
	const struct view_extent *extents;	/* ascending by offset, disjoint, behind the head */
	uint64_t size;
	struct physmem *mem;
};

/* Bytes read at offset: n, fewer only at its end, 0 beyond it. The caller ends the batch of reads (physmem_rest()). */
size_t view_read(const struct view *v, uint64_t offset, void *buf, size_t n);

/* True if all n bytes are zero. */
bool all_zero(const void *buf, size_t n);

#endif
