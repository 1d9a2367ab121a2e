/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A set of page frames, as ascending runs or as a bitmap of equally sized blocks (a virtio-mem plug bitmap).
 * Both answer the same two questions in O(log runs) or O(words); neither owns the memory that it points to.
 */
#ifndef OLDMEM_PAGESET_H
#define OLDMEM_PAGESET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pageset {
	uint64_t first, end;	 /* domain, pfns [first, end): elsewhere the set has no members */
	uint64_t pages_per_bit;	 /* bitmap: pages that one bit speaks for; 0: data holds runs */
	size_t n;		 /* bits, or runs */
	const uint64_t *data;	 /* words, bit 0 first; or n pairs of [start, end) pfns, ascending and disjoint */
};

bool pageset_has(const struct pageset *s, uint64_t pfn);

/* The first pfn in [pfn, end) whose membership is `member`; `end` if there is none. */
uint64_t pageset_next(const struct pageset *s, uint64_t pfn, uint64_t end, bool member);

#endif
