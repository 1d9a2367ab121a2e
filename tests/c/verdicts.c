/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * verdicts GUARD PFN END, for a comparison with what Python says: the rules, then a line for each page: its rule or -1,
 * next RAM, next refused page. What is_ram() and fill() say must be the same, else this ends with status 1.
 */
#include <err.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <oldmem_guard.h>

int main(int argc, char **argv)
{
	oldmem_guard *g;
	uint64_t pfn, end, *words;
	size_t rules;

	if (argc != 4)
		errx(2, "usage: verdicts GUARD PFN END");
	if (oldmem_guard_new(&g) || oldmem_guard_open(g, argv[1]))
		errx(1, "%s", oldmem_guard_error(g));
	pfn = strtoull(argv[2], NULL, 0);
	end = strtoull(argv[3], NULL, 0);
	words = malloc(((end - pfn + 63) / 64 + 1) * sizeof(*words));
	if (!words)
		errx(1, "out of memory");
	if (oldmem_guard_rules(g, &rules))
		errx(1, "no number of rules");
	for (int i = 0; i < (int)rules; i++) {
		const char *name, *reason;

		if (oldmem_guard_rule(g, i, &name, &reason, NULL))
			errx(1, "no rule %d", i);
		printf("%s: %s\n", name, reason);
	}
	for (uint64_t p = pfn; p < end; p++) {
		uint64_t next_ram, next_refused, n = end - p, at = (n + 63) / 64;
		int ram, rule;

		words[at] = UINT64_C(0x5a5a5a5a5a5a5a5a);
		if (oldmem_guard_is_ram(g, p, &ram) || oldmem_guard_why(g, p, &rule) ||
		    oldmem_guard_next_ram(g, p, end, &next_ram) ||
		    oldmem_guard_next_refused(g, p, end, &next_refused) || oldmem_guard_fill(g, p, n, words))
			errx(1, "a question about pfn %#" PRIx64 " failed", p);
		for (uint64_t i = 0; i < at * 64; i++) {
			int asked = 0;

			if (i < n && oldmem_guard_is_ram(g, p + i, &asked))
				errx(1, "is_ram(%#" PRIx64 ") failed", p + i);
			if ((int)(words[i / 64] >> i % 64 & 1) != asked)
				errx(1, "fill(%#" PRIx64 ") and is_ram() differ at %" PRIu64, p, i);
		}
		if (words[at] != UINT64_C(0x5a5a5a5a5a5a5a5a))
			errx(1, "fill(%#" PRIx64 ") wrote behind its words", p);
		if (ram != (rule == OLDMEM_GUARD_NO_RULE))
			errx(1, "is_ram(%#" PRIx64 ") and why() differ", p);
		printf("%d %" PRIu64 " %" PRIu64 "\n", rule, next_ram, next_refused);
	}
	free(words);
	oldmem_guard_close(g);
	return 0;
}
