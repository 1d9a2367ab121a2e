/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * fuzz FILE...: opens each as a compiled guard; a line for each: the status, and the error or the number of rules.
 * Where one opens, everything is asked of it around its borders, which next_ram() and next_refused() name.
 */
#include <err.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <oldmem_guard.h>

enum { BORDERS = 200, PAGES = 300 };

static uint8_t buffer[3 << 12];

static void ask(oldmem_guard *g, uint64_t pfn, uint64_t limit, unsigned shift)
{
	uint64_t words[(PAGES + 63) / 64], n = limit - pfn < PAGES ? limit - pfn : PAGES;
	int ram, rule;

	if (oldmem_guard_fill(g, pfn, n, words))
		errx(1, "fill(%#" PRIx64 ", %" PRIu64 ") failed", pfn, n);
	for (uint64_t i = 0; i < n; i++) {
		if (oldmem_guard_is_ram(g, pfn + i, &ram) || oldmem_guard_why(g, pfn + i, &rule))
			errx(1, "a question about pfn %#" PRIx64 " failed", pfn + i);
		if (ram != (rule < 0) || ram != (int)(words[i / 64] >> i % 64 & 1))
			errx(1, "answers about pfn %#" PRIx64 " differ", pfn + i);
	}
	if (n && oldmem_guard_read(g, pfn << shift, buffer, sizeof(buffer)))
		errx(1, "read of pfn %#" PRIx64 " failed", pfn);
}

static void ask_around(oldmem_guard *g)
{
	uint64_t pfn = 0, limit;
	unsigned shift;

	if (oldmem_guard_page_shift(g, &shift))
		errx(1, "no page shift");
	limit = UINT64_C(1) << (64 - shift);
	for (int i = 0; i < BORDERS && pfn < limit; i++) {
		uint64_t found;

		ask(g, pfn > PAGES / 2 ? pfn - PAGES / 2 : 0, limit, shift);
		if (i % 2 ? oldmem_guard_next_ram(g, pfn, limit, &found) :
		    oldmem_guard_next_refused(g, pfn, limit, &found))
			errx(1, "next behind pfn %#" PRIx64 " failed", pfn);
		if (found < pfn || found > limit)
			errx(1, "next behind pfn %#" PRIx64 " is %#" PRIx64, pfn, found);
		pfn = found;
	}
	ask(g, limit - PAGES / 2, limit, shift);
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		oldmem_guard_status status;
		oldmem_guard *g;
		size_t rules;

		if (oldmem_guard_new(&g))
			errx(1, "out of memory");
		status = oldmem_guard_open(g, argv[i]);
		if (status) {
			printf("%d %s\n", (int)status, oldmem_guard_error(g));
		} else {
			ask_around(g);
			oldmem_guard_rules(g, &rules);
			printf("0 %zu rules\n", rules);
		}
		oldmem_guard_close(g);
	}
	return 0;
}
