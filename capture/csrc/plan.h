/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What "oldmem run" tells the library inside of the collector (preload.c): one read-only file with the header, the
 * extents, the segments and a compiled guard, and one that every process of the collector's writes what it saw to. Both
 * are memfds of the process `pid`, found as /proc/<pid>/fd/<n>. Writer and reader are built from this one header, so
 * there are no versions; `layout` tells a library of another build.
 */
#ifndef OLDMEM_PLAN_H
#define OLDMEM_PLAN_H

#include "guardfile.h"
#include "view.h"

enum { PLAN_NAME = 4096, PLAN_RULES = GUARDFILE_MAX_RULES };

struct plan_file {
	int64_t fd;			/* of process `pid` */
	uint64_t dev, ino;		/* as fstat() tells them */
	uint64_t maps_dev, maps_ino;	/* as /proc/<pid>/maps tells them (btrfs, overlayfs: others); major << 32 | minor */
};

/* A range of old memory that can be mapped: whole pages, at a whole page of its file. */
struct plan_segment {
	uint64_t paddr, size;		/* bytes */
	uint64_t offset;		/* of paddr in the file */
	uint64_t file;			/* index */
	uint64_t first_page;		/* number of its first page among the pages of all segments */
};

struct plan {
	uint64_t layout;		/* sizeof(struct plan), as the writer knows it */
	uint64_t plan_size;		/* bytes of this file */
	int64_t pid;
	int64_t tally_fd;
	int64_t vmcore_fd;		/* leads to the file that has the vmcore for every program */
	uint64_t dev, ino;		/* of that file, as fstat() tells them */
	uint64_t page_shift;
	uint64_t size;			/* of the vmcore, bytes */
	uint64_t head, head_size;	/* offsets are from the start of this file; head is at a whole page */
	uint64_t files, n_files;	/* struct plan_file; [0] is this file */
	uint64_t extents, n_extents;	/* struct view_extent */
	uint64_t segments, n_segments;	/* struct plan_segment, ascending and disjoint */
	uint64_t guard, guard_size;	/* a compiled guard */
	char name[PLAN_NAME];		/* absolute path that programs open as vmcore; empty where that file is there */
};

/* Added to by all processes with atomic operations. Pages are counted when they are mapped. */
struct plan_tally {
	uint64_t ended;			/* not 0: what is added from now on, nobody sees */
	uint64_t pages_shown;
	uint64_t refused[PLAN_RULES];	/* pages, by rule */
	uint64_t failed[];		/* pages that were not there when they were touched: a bit for each of all segments */
};

#endif
