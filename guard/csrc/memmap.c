/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "memmap.h"

#include <string.h>

static uint64_t load64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static uint32_t load32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static bool is_huge(const struct memmap_shape *s, const uint8_t *word)
{
	return !s->huge_mask || (load32(word) & s->huge_mask) == s->huge;
}

/*
 * A page with the flag, or one behind it. memory_failure() flags the broken page itself, also within a large folio
 * (mm/memory-failure.c); but of a HugeTLB folio it flags the head, and lists which pages are broken elsewhere
 * (commit 161df60e9e89, _hugetlb_hwpoison). The panic path flags the very page even there (6.8, mce_panic()).
 *
 * A folio reaches as far as tails follow its head. Before 7.1, HugeTLB's vmemmap optimisation may have mapped the first
 * page of the folio's struct pages in place of all others (mm/hugetlb_vmemmap.c): then a copy of the head stands at
 * every 64th page, with the head's flag and kind, and each takes the folio on. Since 7.1 only tails are shared.
 */
static bool follow(const struct memmap_shape *s, struct memmap_pass *pass, const uint8_t *page)
{
	bool flagged = load64(page + s->flags) & s->poison;
	bool tail = load64(page + s->head) & 1;
	bool poisoned = flagged;

	if (pass->left && !tail)
		pass->left = 0;
	if (pass->left && pass->undecided && !is_huge(s, page + s->huge_at - s->size))
		pass->left = 0;
	pass->undecided = 0;
	if (pass->left) {
		pass->left--;
		poisoned = true;
	}
	if (flagged) {
		pass->flagged++;
		if (!tail) {
			pass->undecided = s->huge_mask && s->huge_at >= s->size;
			if (pass->undecided || is_huge(s, page + s->huge_at))
				pass->left = s->folio_pages - 1;
		}
	}
	return poisoned;
}

bool memmap_scan(const struct memmap_shape *shape, struct memmap_pass *pass, const void *pages, size_t n,
		 uint8_t *poisoned, uint8_t *offline)
{
	const struct memmap_shape s = *shape;
	const uint8_t *page = pages;
	bool follows = pass->left, any = false;

	for (size_t i = 0; i < n; i++, page += s.size) {
		uint8_t bit = (uint8_t)(1 << i % 8);

		if (follows || load64(page + s.flags) & s.poison) {
			if (follow(shape, pass, page)) {
				poisoned[i / 8] |= bit;
				any = true;
			}
			follows = pass->left;
		}
		if (s.offline_mask && (load32(page + s.type) & s.offline_mask) == s.offline && !(load64(page + s.head) & 1)) {
			offline[i / 8] |= bit;
			any = true;
		}
	}
	return any;
}
