/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a rule says of one page, inline: this is asked of each rule for each page that somebody asks about. */
#ifndef OLDMEM_VERDICT_H
#define OLDMEM_VERDICT_H

#include "gate.h"

/* Index of the first run that ends beyond pfn; s->n if there is none. */
static inline size_t run_after(const struct pageset *s, uint64_t pfn)
{
	size_t low = 0, high = s->n;

	while (low < high) {
		size_t mid = low + (high - low) / 2;

		if (s->data[2 * mid + 1] > pfn)
			high = mid;
		else
			low = mid + 1;
	}
	return low;
}

/* The bit that speaks for the page that lies `pages` into the domain. Plug bitmaps have powers of two: no division. */
static inline uint64_t bit_of(const struct pageset *s, uint64_t pages)
{
	uint64_t per = s->pages_per_bit;

	return per & (per - 1) ? pages / per : pages >> __builtin_ctzll(per);
}

static inline bool has_page(const struct pageset *s, uint64_t pfn)
{
	if (pfn < s->first || pfn >= s->end)
		return false;
	if (s->pages_per_bit) {
		uint64_t bit = bit_of(s, pfn - s->first);

		return bit < s->n && (s->data[bit / 64] >> bit % 64 & 1);
	} else {
		size_t i = run_after(s, pfn);

		return i < s->n && s->data[2 * i] <= pfn;
	}
}

static inline bool rule_refuses(const struct gate_rule *r, uint64_t pfn)
{
	return pfn >= r->first && pfn < r->end && has_page(&r->set, pfn) == r->deny;
}

#endif
