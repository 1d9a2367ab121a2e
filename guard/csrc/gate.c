/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "gate.h"

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

static bool rule_refuses(const struct gate_rule *r, uint64_t pfn)
{
	return pfn >= r->first && pfn < r->end && pageset_has(&r->set, pfn) == r->deny;
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

	*refuser = gate_refuser(g, pfn);
	if (*refuser >= 0) {
		asked = (size_t)*refuser;
		end = rule_next(&g->rules[asked], pfn, end, false);
	}
	/* the run also ends where a rule that is asked earlier begins to refuse */
	for (size_t i = 0; i < asked; i++)
		end = rule_next(&g->rules[i], pfn, end, true);
	return end;
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
