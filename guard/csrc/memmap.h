/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One pass over struct pages of a dead kernel: which pages it had marked as not to be touched. Offsets and values
 * come from its VMCOREINFO; the bytes are its own, in the byte order of the machine that this runs on.
 */
#ifndef OLDMEM_MEMMAP_H
#define OLDMEM_MEMMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct memmap_shape {
	uint32_t size;		/* bytes of a struct page; the fields below lie inside it, at multiples of their size */
	uint32_t flags;		/* offset of the 64-bit page.flags */
	uint32_t type;		/* offset of the 32-bit page._mapcount, which is also page.page_type */
	uint32_t head;		/* offset of the 64-bit page.compound_head or compound_info: bit 0 is set in tail pages */
	uint64_t poison;	/* mask of PG_hwpoison in page.flags; 0: the kernel has no such flag */
	uint32_t offline_mask, offline;	/* type & offline_mask == offline: PageOffline; mask 0: there is no such type */
};

/*
 * Set bit i (bit 0 of byte 0 first) of `poisoned` and of `offline` for each of the n struct pages that says so of its
 * page; other bits stay. A tail page has a flag of its own, but no type. Returns whether any bit was set.
 */
bool memmap_scan(const struct memmap_shape *shape, const void *pages, size_t n, uint8_t *poisoned, uint8_t *offline);

#endif
