/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where in an ascending, disjoint list a place is or would be, inline: this is asked on each read and each mapping. */
#ifndef OLDMEM_AFTER_H
#define OLDMEM_AFTER_H

#include "view.h"

/* Index of the first extent that ends behind the offset; n if there is none. */
static inline size_t extent_after(const struct view_extent *extents, size_t n, uint64_t offset)
{
	size_t low = 0, high = n;

	while (low < high) {
		size_t mid = low + (high - low) / 2;

		if (extents[mid].offset + extents[mid].size > offset)
			high = mid;
		else
			low = mid + 1;
	}
	return low;
}

/* Index of the first segment that ends behind paddr; n if there is none. */
static inline size_t segment_after(const struct physmem_segment *segments, size_t n, uint64_t paddr)
{
	size_t low = 0, high = n;

	while (low < high) {
		const struct physmem_segment *s = &segments[low + (high - low) / 2];

		if (s->paddr > paddr || paddr - s->paddr < s->size)
			high = (size_t)(s - segments);
		else
			low = (size_t)(s - segments) + 1;
	}
	return low;
}

#endif
