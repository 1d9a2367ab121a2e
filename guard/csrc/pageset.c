/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pageset.h"

#include "verdict.h"

static uint64_t next_in_runs(const struct pageset *s, uint64_t pfn, uint64_t end, bool member)
{
	size_t i = run_after(s, pfn);
	uint64_t next;

	if (i == s->n)
		return member ? end : pfn;
	if (member)
		next = s->data[2 * i] > pfn ? s->data[2 * i] : pfn;
	else
		next = s->data[2 * i] > pfn ? pfn : s->data[2 * i + 1];
	return next < end ? next : end;
}

static uint64_t next_in_bitmap(const struct pageset *s, uint64_t pfn, uint64_t end, bool member)
{
	uint64_t bit, last, next;

	if (pfn < s->first) {
		if (!member)
			return pfn;
		if (end <= s->first)
			return end;
		pfn = s->first;
	}
	bit = bit_of(s, pfn - s->first);
	last = bit_of(s, end - 1 - s->first);
	while (bit < s->n && bit <= last) {
		uint64_t word = s->data[bit / 64];

		if (!member)
			word = ~word;
		word &= ~UINT64_C(0) << bit % 64;
		if (word) {
			bit = bit / 64 * 64 + (uint64_t)__builtin_ctzll(word);
			break;
		}
		bit = (bit / 64 + 1) * 64;
	}
	if (bit >= s->n) {
		if (member)
			return end;
		bit = s->n;
	}
	next = s->first + bit * s->pages_per_bit;
	if (next < pfn)
		next = pfn;
	return next < end ? next : end;
}

uint64_t pageset_next(const struct pageset *s, uint64_t pfn, uint64_t end, bool member)
{
	if (pfn >= end)
		return end;
	if (pfn >= s->end)
		return member ? end : pfn;
	if (s->pages_per_bit)
		return next_in_bitmap(s, pfn, end, member);
	return next_in_runs(s, pfn, end, member);
}

bool pageset_has(const struct pageset *s, uint64_t pfn)
{
	return has_page(s, pfn);
}
