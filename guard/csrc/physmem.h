/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Guarded reads of old memory by physical address.
 *
 * Old memory is a list of segments, each some file's view of a physical range: /dev/mem (mapped in windows, because
 * read(2) of it ends at the capture kernel's own memory), an image, a block device (pread), /proc/vmcore. A page
 * that the gate refuses reads as zeros; a page that cannot be read (no segment, EIO, EFAULT, SIGBUS) reads as zeros
 * and is logged; the rest of the request is served. No allocation, and no state but the structure itself, its counters and
 * the thread's SIGBUS slot. One structure serves one thread at a time; any number of them may share a gate, which another
 * thread may replace meanwhile (gate_install()): what is copied or zeroed from then on obeys the new one.
 */
#ifndef OLDMEM_PHYSMEM_H
#define OLDMEM_PHYSMEM_H

#include "corefile.h"
#include "gate.h"
#include "tally.h"

enum {
	PHYSMEM_PREAD,
	PHYSMEM_MMAP,
	PHYSMEM_CORE,	/* through `core`, whatever fd is */
	PHYSMEM_ABSENT,	/* memory that was there and no file has: a record of the touched pages alone; fd is not used */
};
enum { PHYSMEM_WINDOWS = 16 };

struct physmem_segment {
	uint64_t paddr, size;	/* bytes, whole pages */
	uint64_t offset;	/* of paddr in the file */
	int fd;
	int how;
};

struct physmem_window {
	const struct physmem_segment *segment;
	uint64_t start, size;	/* bytes from the segment's start */
	const uint8_t *map;
	uint64_t used;		/* clock of the last use: the oldest window makes room */
};

struct physmem {
	size_t n;
	const struct physmem_segment *segments;	/* ascending, disjoint */
	const struct gate *const *gate;		/* where the gate in force is found, looked up for each run of pages */
	struct corefile *core;			/* NULL where no segment is of PHYSMEM_CORE */
	uint32_t page_shift;
	uint64_t window_size;			/* bytes, a power of two */
	struct physmem_window windows[PHYSMEM_WINDOWS];
	uint64_t clock;
	struct physmem_tally *tally;			/* any number of structures may count into one, in any processes */
	struct physmem_log *log;			/* of what fails; NULL: it is only counted */
};

/* See to it that SIGBUS of a read is caught (sigbus.h); before the first read, any number of times. 0 or -errno. */
int physmem_catch_sigbus(void);

/* Fill buf with n bytes from paddr on; refused and unreadable pages, and what lies beyond 2^64, become zeros. */
void physmem_read(struct physmem *m, uint64_t paddr, void *buf, size_t n);

/*
 * As physmem_read(), but all or nothing, and nothing is counted or logged: 0, or -EACCES (a page is refused) or
 * another -errno with *bad set to the first physical address that could not be read.
 */
int physmem_read_exact(struct physmem *m, uint64_t paddr, void *buf, size_t n, uint64_t *bad);

/* The end of a batch of reads: no file stays open that was opened for it. */
void physmem_rest(struct physmem *m);

/* Is nothing open that physmem_rest() would close? */
bool physmem_at_rest(const struct physmem *m);

/* Unmap all windows. */
void physmem_unmap(struct physmem *m);

#endif
