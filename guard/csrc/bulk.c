/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "bulk.h"

#include <string.h>

#include "verdict.h"

bool gate_is_ram(const struct gate *g, uint64_t pfn)
{
	bool refused = false;

	/* asking all costs less than guessing wrong where a fragmented device's answer leads */
	for (size_t i = 0; i < g->n; i++)
		refused |= rule_refuses(&g->rules[i], pfn);
	return !refused;
}

/* Clear the bits [from, to) of an array of words. */
static void clear_bits(uint64_t *words, uint64_t from, uint64_t to)
{
	uint64_t first, last, head, tail;

	if (from >= to)
		return;
	first = from / 64;
	last = (to - 1) / 64;
	head = ~UINT64_C(0) << from % 64;
	tail = ~UINT64_C(0) >> (63 - (to - 1) % 64);
	if (first == last) {
		words[first] &= ~(head & tail);
		return;
	}
	words[first] &= ~head;
	memset(words + first + 1, 0, (last - first - 1) * sizeof(*words));
	words[last] &= ~tail;
}

/* Runs are walked, not searched for again: a set may change at every other page. */
static void clear_by_runs(const struct pageset *s, uint64_t pfn, uint64_t end, bool member, uint64_t base,
			  uint64_t *words)
{
	uint64_t hole = pfn;	/* where the pages since the last run begin */

	for (size_t i = run_after(s, pfn); i < s->n && s->data[2 * i] < end; i++) {
		uint64_t from = s->data[2 * i] > pfn ? s->data[2 * i] : pfn;
		uint64_t to = s->data[2 * i + 1] < end ? s->data[2 * i + 1] : end;

		if (member)
			clear_bits(words, from - base, to - base);
		else
			clear_bits(words, hole - base, from - base);
		hole = to;
	}
	if (!member)
		clear_bits(words, hole - base, end - base);
}

/* One page a bit, [pfn, end) inside of the bitmap: a word at a time. */
static void clear_by_words(const struct pageset *s, uint64_t pfn, uint64_t end, bool member, uint64_t base,
			  uint64_t *words)
{
	while (pfn < end) {
		uint64_t bit = pfn - s->first, shift = (pfn - base) % 64;
		uint64_t n = 64 - shift < end - pfn ? 64 - shift : end - pfn;
		uint64_t found = s->data[bit / 64] >> bit % 64;

		if (bit % 64 + n > 64)
			found |= s->data[bit / 64 + 1] << (64 - bit % 64);
		if (!member)
			found = ~found;
		found &= ~UINT64_C(0) >> (64 - n);
		words[(pfn - base) / 64] &= ~(found << shift);
		pfn += n;
	}
}

/* Clear in `words`, whose bit 0 is page `base`, the bits of the pages of [pfn, end) whose membership is `member`. */
static void clear_pages(const struct pageset *s, uint64_t pfn, uint64_t end, bool member, uint64_t base,
			uint64_t *words)
{
	if (!s->pages_per_bit) {
		clear_by_runs(s, pfn, end, member, base, words);
		return;
	}
	if (s->pages_per_bit == 1 && pfn >= s->first && end <= s->end && end - s->first <= s->n) {
		clear_by_words(s, pfn, end, member, base, words);
		return;
	}
	while ((pfn = pageset_next(s, pfn, end, member)) < end) {
		uint64_t stop = pageset_next(s, pfn, end, !member);

		clear_bits(words, pfn - base, stop - base);
		pfn = stop;
	}
}

void gate_fill(const struct gate *g, uint64_t pfn, uint64_t n, uint64_t *words)
{
	memset(words, 0xff, n / 64 * sizeof(*words));
	if (n % 64)
		words[n / 64] = ~UINT64_C(0) >> (64 - n % 64);
	for (size_t i = 0; i < g->n; i++) {
		const struct gate_rule *r = &g->rules[i];
		uint64_t from = pfn > r->first ? pfn : r->first;
		uint64_t to = pfn + n < r->end ? pfn + n : r->end;

		if (from < to)
			clear_pages(&r->set, from, to, r->deny, pfn, words);
	}
}
