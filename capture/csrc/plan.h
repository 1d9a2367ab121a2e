/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What "oldmem run" tells the library inside of the collector (preload.c): one read-only file with the header, the
 * extents, the segments and a compiled guard, and one shared page to which every process of the collector's adds what
 * it saw. Both are memfds of the process `pid`, found as /proc/<pid>/fd/<n>. Writer and reader are built from this one
 * header, so there are no versions; `layout` tells a library of another build.
 */
#ifndef OLDMEM_PLAN_H
#define OLDMEM_PLAN_H

#include "guardfile.h"
#include "view.h"

enum { PLAN_NAME = 4096, PLAN_RULES = GUARDFILE_MAX_RULES, PLAN_FAULTS = 4096 };

struct plan {
	uint64_t layout;		/* sizeof(struct plan), as the writer knows it */
	uint64_t plan_size;		/* bytes of this file */
	int64_t pid;
	int64_t plan_fd, tally_fd, shape_fd;
	uint64_t shape_dev, shape_ino;	/* of the file that stands for the vmcore, as fstat() tells them */
	uint64_t dev, ino;		/* of the file that programs open as vmcore; 0 where there is none of that name */
	uint64_t page_shift;
	uint64_t size;			/* of the vmcore, bytes */
	uint64_t head, head_size;	/* offsets are from the start of this file; head is at a whole page */
	uint64_t extents, n_extents;	/* struct view_extent, whole pages */
	uint64_t segments, n_segments;	/* struct physmem_segment, ascending and disjoint; fd is of process `pid` */
	uint64_t guard, guard_size;	/* a compiled guard */
	char name[PLAN_NAME];		/* absolute path that programs open as vmcore */
};

/* Added to by all processes with atomic operations. Pages are counted when they are mapped. */
struct plan_tally {
	uint64_t loaded;		/* processes that the library is in */
	uint64_t pages_shown;
	uint64_t refused[PLAN_RULES];	/* pages, by rule */
	uint64_t n_faults;		/* claimed places of faults[], may be more than there are */
	struct physmem_fault faults[PLAN_FAULTS];
};

#endif
