/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pageset.h"

/* Index of the first run that ends beyond pfn; s->n if there is none. */
static size_t run_after(const struct pageset *s, uint64_t pfn)
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
	uint64_t bit, next;

	if (pfn < s->first) {
		if (!member)
			return pfn;
		pfn = s->first;
	}
	bit = (pfn - s->first) / s->pages_per_bit;
	while (bit < s->n) {
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
	if (pfn < s->first || pfn >= s->end)
		return false;
	if (s->pages_per_bit) {
		uint64_t bit = (pfn - s->first) / s->pages_per_bit;

		return bit < s->n && (s->data[bit / 64] >> bit % 64 & 1);
	}
	return pageset_next(s, pfn, pfn + 1, true) == pfn;
}
