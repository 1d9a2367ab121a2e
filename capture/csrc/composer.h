/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The plan as a process of the collector's has it, and the files of the process that wrote it. */
#ifndef OLDMEM_COMPOSER_H
#define OLDMEM_COMPOSER_H

#include <sys/mman.h>
#include <sys/types.h>

#include "plan.h"

/* Pages of nobody's: zeros, which cost no memory. */
enum { COMPOSER_EMPTY = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE };

struct composer {
	const struct plan *plan;		/* all of the mapped file */
	struct plan_tally *tally;
	void *(*mmap)(void *at, size_t n, int prot, int flags, int fd, off_t offset);	/* libc's own */
	const struct gate *gate;		/* NULL until composer_ready() */
};

/*
 * Take what the plan at `path` says. 0, or -EBADMSG (a plan of another build), or another -errno where it cannot be had.
 * The guard is checked by composer_ready(), not here: most processes never open the vmcore.
 */
int composer_open(struct composer *c, const char *path);

/*
 * The rules are there, and what is mapped is safe to touch: to be asked before anything is mapped. Any number of threads
 * and signal handlers may ask at once.
 */
bool composer_ready(struct composer *c);

/* What lies at an offset of the plan. */
static inline const void *plan_part(const struct composer *c, uint64_t offset)
{
	return (const uint8_t *)c->plan + offset;
}

static inline uint64_t plan_page(const struct composer *c)
{
	return UINT64_C(1) << c->plan->page_shift;
}

/*
 * Unmap what was mapped with `fixed`. What MAP_FIXED was asked for stays taken, by pages that nobody can touch: in a hole
 * another thread's mapping could lie before it is filled, and be replaced then. munmap(2) if there is no room for that.
 */
void composer_unmap(const struct composer *c, void *at, uint64_t n, int fixed);

/*
 * As mmap(2) of the plan's file of that index, PROT_READ and MAP_SHARED; `fixed` is MAP_FIXED, MAP_FIXED_NOREPLACE or 0.
 * The address, or MAP_FAILED with -errno in *err.
 */
void *composer_map(const struct composer *c, void *at, uint64_t n, int fixed, uint64_t file, uint64_t offset, int *err);

#endif
