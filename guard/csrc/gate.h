/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The gate: rules that may each refuse a page frame. A page is RAM unless a rule refuses it; rules are asked in
 * order and the first refusal ends it, as pfn_is_ram() in fs/proc/vmcore.c asks its callbacks.
 */
#ifndef OLDMEM_GATE_H
#define OLDMEM_GATE_H

#include "pageset.h"

struct gate_rule {
	uint64_t first, end;	/* pfns [first, end) that the rule speaks about; it allows all others */
	struct pageset set;	/* inside that: the only pages it allows, or (deny) the pages it refuses */
	bool deny;
	uint64_t *refused;	/* counts the pages that reads asked for and this rule turned into zeros; may be NULL */
};

/*
 * Never changed while anybody may ask it: where rules come and go, gate_install() puts another one in its place, and
 * the earlier one, its rules and their sets stay as they are until nobody can be asking them any more.
 */
struct gate {
	size_t n;
	struct gate_rule *rules;
};

/* Put `gate` in force: whoever looks into *slot from now on finds it, with all that was written to it before. */
void gate_install(const struct gate **slot, const struct gate *gate);

/* Index of the rule that refuses the page, or -1 where it is RAM. */
int gate_refuser(const struct gate *g, uint64_t pfn);

/* The end (at most `end`) of the longest run from pfn on with one verdict, which goes to *refuser. */
uint64_t gate_run(const struct gate *g, uint64_t pfn, uint64_t end, int *refuser);

/* The first pfn in [pfn, end) that is RAM (ram) or is refused (!ram); `end` if there is none. */
uint64_t gate_next(const struct gate *g, uint64_t pfn, uint64_t end, bool ram);

#endif
