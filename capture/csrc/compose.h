/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A vmcore mapped into this process as mmap_vmcore() (fs/proc/vmcore.c) maps it: RAM from the files that show it, the
 * zero page for refused pages and gaps, the header from memory. What is mapped stays safe to read: a page that cannot
 * be delivered (SIGBUS: a file that is too short, broken memory) becomes a zero page and a line in the tally.
 */
#ifndef OLDMEM_COMPOSE_H
#define OLDMEM_COMPOSE_H

#include <sys/stat.h>
#include <sys/types.h>

#include "plan.h"

/* The libc behind the functions that preload.c puts in front of it. */
struct libc {
	int (*open)(const char *path, int flags, ...);
	int (*close)(int fd);
	void *(*mmap)(void *at, size_t n, int prot, int flags, int fd, off_t offset);
	int (*munmap)(void *at, size_t n);
	int (*fstat)(int fd, struct stat *st);
};

struct composer {
	const struct libc *libc;
	const struct plan *plan;	/* all of the mapped file */
	struct plan_tally *tally;
	struct gate gate;
};

/*
 * Take what the plan at `path` says. 0 or -errno, with one line in `why`. The guard is checked by compose_ready(), not
 * here: most processes never open the vmcore.
 */
int compose_open(struct composer *c, const struct libc *libc, const char *path, char *why, size_t room);
int compose_ready(struct composer *c, char *why, size_t room);

/* "/proc/<pid>/fd/<fd>" of the plan's process, opened with the flags. A descriptor or -errno. */
int compose_reopen(const struct composer *c, int64_t fd, int flags);

enum compose_how {
	COMPOSE_ALL,	/* all of it or -errno: what cannot be mapped the caller may read */
	COMPOSE_SOME	/* pages that cannot be mapped are zeros and in the tally; stops where `pieces` are used up.
			   -ENOMEM where the process has no room for mappings, -EIO where "oldmem run" is gone */
};

/*
 * Map n bytes of the vmcore from `offset` on (whole pages) at *at, or anywhere where that is NULL. `fixed` is what
 * mmap(2) has for "there and nowhere else": 0, MAP_FIXED or MAP_FIXED_NOREPLACE. At most `pieces` mappings are made.
 * Returns the bytes mapped, or -errno with nothing mapped. What lies behind the vmcore's end is zeros.
 */
int64_t compose(struct composer *c, void **at, uint64_t offset, uint64_t n, int fixed, unsigned pieces,
		enum compose_how how);

/* To be called for each range that is about to be unmapped or mapped over: faults there are no longer ours. */
void compose_forget(const void *at, size_t n);

#endif
