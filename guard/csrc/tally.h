/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What reads of old memory came to: counters, and a log of the pages that could not be read. Both may lie in memory that
 * several processes share: a server and the one that stands by for it count into one place, so that nothing that was
 * lost is forgotten with whoever dies. Any number of threads and processes may count at once, none of them waits, and
 * one that is killed in between leaves a log that the others can go on with.
 */
#ifndef OLDMEM_TALLY_H
#define OLDMEM_TALLY_H

#include <stdint.h>

/* What is read twice counts twice. */
struct physmem_tally {
	uint64_t bytes_read, bytes_refused;
	uint64_t fault_pages;	/* page reads that failed */
	uint64_t unlisted;	/* those among them that the log has no room for */
};

struct physmem_fault {
	uint64_t first, end;	/* pfns [first, end) that could not be read */
	int error;		/* errno; ENXIO where no segment holds the page, ENODATA where it is absent, EFAULT also for SIGBUS */
};

enum { TALLY_FAULTS = 4096 };

struct physmem_log {
	uint64_t n;					/* of the runs below; one with error 0 is being written, or never was */
	struct physmem_fault faults[TALLY_FAULTS];	/* in no order; runs may overlap */
};

/* Count n; relaxed. */
void tally_add(uint64_t *counter, uint64_t n);

/*
 * Pages [first, end) could not be read. Where there is no log, they are counted; where it has no room, as unlisted too.
 * A killed process may leave pages counted as unlisted that are listed, never the other way round.
 */
void tally_failed(struct physmem_tally *tally, struct physmem_log *log, uint64_t first, uint64_t end, int error);

#endif
