/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "gate.h"

#include "verdict.h"

enum { FIRST_LOOK = 4096 };	/* pages, more than most reads ask for */

/* The first pfn in [pfn, end) that the rule refuses (refused) or allows (!refused). */
static uint64_t rule_next(const struct gate_rule *r, uint64_t pfn, uint64_t end, bool refused)
{
	uint64_t stop = end < r->end ? end : r->end;

	if (pfn < r->first || pfn >= r->end) {
		if (!refused)
			return pfn;
		if (pfn >= r->end || r->first >= end)
			return end;
		pfn = r->first;
	}
	pfn = pageset_next(&r->set, pfn, stop, refused == r->deny);
	return pfn < stop || !refused ? pfn : end;
}

void gate_install(const struct gate **slot, const struct gate *gate)
{
	__atomic_store_n(slot, gate, __ATOMIC_RELEASE);
}

int gate_refuser(const struct gate *g, uint64_t pfn)
{
	for (size_t i = 0; i < g->n; i++)
		if (rule_refuses(&g->rules[i], pfn))
			return (int)i;
	return -1;
}

uint64_t gate_run(const struct gate *g, uint64_t pfn, uint64_t end, int *refuser)
{
	size_t asked = g->n;
	uint64_t stop = pfn, found, span = FIRST_LOOK;

	*refuser = gate_refuser(g, pfn);
	if (*refuser >= 0)
		asked = (size_t)*refuser;
	/*
	 * Ever further ahead: asked at once about a far end, each rule would be walked up to there for each run, though
	 * another rule ends the run at the next page.
	 */
	do {
		pfn = stop;
		stop = end - pfn > span ? pfn + span : end;
		span *= 8;
		found = asked < g->n ? rule_next(&g->rules[asked], pfn, stop, false) : stop;
		/* the run also ends where a rule that is asked earlier begins to refuse */
		for (size_t i = 0; i < asked; i++)
			found = rule_next(&g->rules[i], pfn, found, true);
	} while (found == stop && stop < end);
	return found;
}

uint64_t gate_next(const struct gate *g, uint64_t pfn, uint64_t end, bool ram)
{
	while (pfn < end) {
		int refuser;
		uint64_t stop = gate_run(g, pfn, end, &refuser);

		if ((refuser < 0) == ram)
			return pfn;
		pfn = stop;
	}
	return end;
}
