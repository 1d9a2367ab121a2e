/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tally.h"

#include <errno.h>
#include <stdbool.h>

void tally_add(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static void lower_to(uint64_t *place, uint64_t value)
{
	uint64_t is = __atomic_load_n(place, __ATOMIC_RELAXED);

	while (is > value && !__atomic_compare_exchange_n(place, &is, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

static void raise_to(uint64_t *place, uint64_t value)
{
	uint64_t is = __atomic_load_n(place, __ATOMIC_RELAXED);

	while (is < value && !__atomic_compare_exchange_n(place, &is, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

/* Runs only ever grow: what touched one when it was looked at touches it when it is widened. */
static bool widen(struct physmem_log *log, uint64_t n, uint64_t first, uint64_t end, int error)
{
	for (uint64_t i = 0; i < n; i++) {
		struct physmem_fault *f = &log->faults[i];

		if (__atomic_load_n(&f->error, __ATOMIC_ACQUIRE) == error &&
		    end >= __atomic_load_n(&f->first, __ATOMIC_RELAXED) &&
		    first <= __atomic_load_n(&f->end, __ATOMIC_RELAXED)) {
			lower_to(&f->first, first);
			raise_to(&f->end, end);
			return true;
		}
	}
	return false;
}

void tally_failed(struct physmem_tally *tally, struct physmem_log *log, uint64_t first, uint64_t end, int error)
{
	/* where nobody has memory the segments tell: the second half of the log is for what only the reads can know */
	uint64_t room = error == ENXIO ? TALLY_FAULTS / 2 : TALLY_FAULTS, n;

	tally_add(&tally->fault_pages, end - first);
	if (!log)
		return;
	/* until they are in the log: we may be killed at any moment */
	tally_add(&tally->unlisted, end - first);
	n = __atomic_load_n(&log->n, __ATOMIC_RELAXED);
	if (!widen(log, n, first, end, error)) {
		struct physmem_fault *f;

		while (n < room && !__atomic_compare_exchange_n(&log->n, &n, n + 1, true, __ATOMIC_RELAXED,
								__ATOMIC_RELAXED))
			;
		if (n >= room)
			return;
		f = &log->faults[n];
		f->first = first;
		f->end = end;
		__atomic_store_n(&f->error, error, __ATOMIC_RELEASE);
	}
	__atomic_fetch_sub(&tally->unlisted, end - first, __ATOMIC_RELAXED);
}
