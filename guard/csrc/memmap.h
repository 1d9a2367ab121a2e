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
	/*
	 * HugeTLB folios have word & huge_mask == huge, where the 32-bit word lies huge_at bytes from the start of the
	 * head's struct page: in it, or in the one that follows. Mask 0: they cannot be told from other folios.
	 */
	uint32_t huge_at, huge_mask, huge;
	uint32_t folio_pages;	/* of the largest folio; a longer one is damage, and counts up to here */
};

/* What one call leaves to the next, which goes on where it ended. All 0 at the start, and `left` 0 behind a gap. */
struct memmap_pass {
	uint64_t flagged;	/* struct pages with the flag so far: those of a folio that are poisoned with it do not count */
	uint32_t left;		/* how many pages the poisoned folio that is being passed over may still have */
	uint32_t undecided;	/* whether the next struct page is to tell if that folio is of HugeTLB at all */
};

/*
 * Set bit i (bit 0 of byte 0 first) of `poisoned` and of `offline` for each of the n struct pages that says so of its
 * page; other bits stay. A tail page has a flag of its own, but no type. Returns whether any bit was set.
 *
 * A flag on the head of a HugeTLB folio, or of one that may be, is about the whole folio: all its pages are poisoned.
 */
bool memmap_scan(const struct memmap_shape *shape, struct memmap_pass *pass, const void *pages, size_t n,
		 uint8_t *poisoned, uint8_t *offline);

#endif
