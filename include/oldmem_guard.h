/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * May this page of a dead machine's memory be read, if not why not, and reading it.
 *
 * A handle holds the rules of one compiled guard file ("oldmem guard -o FILE" writes it) and the files in which the old
 * memory is found. A page is RAM unless a rule refuses it; rules are asked in their order, and the first that refuses a
 * page is the reason. A refused page is never read: it reads as zeros.
 *
 *	oldmem_guard *g;
 *	if (oldmem_guard_new(&g) || oldmem_guard_open(g, "machine.guard") ||
 *	    oldmem_guard_add_segment(g, fd, 0, 0, size, OLDMEM_GUARD_PREAD))
 *		errx(1, "%s", oldmem_guard_error(g));
 *	oldmem_guard_read(g, paddr, buffer, sizeof(buffer));
 *	oldmem_guard_close(g);
 *
 * Units. A paddr is a physical address of the dead machine, in bytes. A pfn is a paddr over the page size, which is
 * 1 << page shift (oldmem_guard_page_shift()). Ranges are half-open: [pfn, end). There are 1 << (64 - page shift) pfns;
 * that number is good as the end of a range and not as a page.
 *
 * Errors. A call returns OLDMEM_GUARD_OK or what went wrong, and then its results are 0, NULL or -1: a question that
 * fails allows nothing (fill() and read() leave the caller's memory as it is). open() and add_segment() also leave one
 * line in the handle, which oldmem_guard_error() returns; it names the file or range. The questions and read() fail for
 * wrong arguments alone, with OLDMEM_GUARD_INVALID, and leave no line: threads would overwrite each other's.
 *
 * Threads. open(), add_segment() and close() need the handle for themselves: no other call on it may run at the same
 * time. All others may be made on one handle by any number of threads at once, without locks of the caller's; none of
 * them allocates, waits for another thread, or touches state outside of the handle. A segment that is mapped needs a
 * handler for SIGBUS, which is the process's: the first add_segment() of one in the process installs it, and no later
 * one does it again. It runs on the thread's alternate stack where there is one, finds its way by one thread-local
 * pointer, and passes on what is not its own. Whoever replaces that handler must pass SIGBUS on.
 *
 * The guard file stays mapped until close(). It must not be cut or written to meanwhile; to be replaced by a rename, as
 * oldmem does it, is harmless.
 */
#ifndef OLDMEM_GUARD_H
#define OLDMEM_GUARD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

typedef struct oldmem_guard oldmem_guard;

typedef enum oldmem_guard_status {
	OLDMEM_GUARD_OK = 0,
	OLDMEM_GUARD_INVALID = 1,	/* a wrong argument, or a call that the handle is not ready for */
	OLDMEM_GUARD_SYSTEM = 2,	/* the system refused something; the error's text ends with its reason */
	OLDMEM_GUARD_DAMAGED = 3,	/* no guard file, or a cut or damaged one */
	OLDMEM_GUARD_UNSUPPORTED = 4,	/* a guard file of another version, or of a machine of the other byte order */
	OLDMEM_GUARD_NO_MEMORY = 5
} oldmem_guard_status;

/* How a segment is read. */
typedef enum oldmem_guard_how {
	OLDMEM_GUARD_PREAD = 0,		/* images, block devices, /proc/vmcore */
	OLDMEM_GUARD_MMAP = 1		/* /dev/mem, of which read(2) gives no more than the running kernel's own memory */
} oldmem_guard_how;

enum { OLDMEM_GUARD_NO_RULE = -1 };

/* A page that is read twice counts twice. Reads that run meanwhile may be counted in part. */
typedef struct oldmem_guard_counters {
	uint64_t bytes_read;		/* RAM that was copied */
	uint64_t bytes_refused;		/* refused by some rule: zeros */
	uint64_t pages_refused;
	uint64_t pages_failed;		/* RAM that no segment shows, or that could not be read: zeros */
} oldmem_guard_counters;

/* A status in words, never NULL. */
const char *oldmem_guard_status_text(oldmem_guard_status status);

/* An empty handle. NULL in *guard if there is no memory for it. */
oldmem_guard_status oldmem_guard_new(oldmem_guard **guard);

/* Give back the handle and all that it holds; NULL is ignored. Files that were added remain the caller's. */
void oldmem_guard_close(oldmem_guard *guard);

/*
 * The last error of open() or add_segment() on this handle as one line without a newline; "" if there was none, and
 * the words for OLDMEM_GUARD_NO_MEMORY for a NULL handle, which is what new() leaves when it fails. Valid until the
 * next open(), add_segment() or close() of the handle.
 */
const char *oldmem_guard_error(const oldmem_guard *guard);

/*
 * Take the rules from a compiled guard file. Everything in the file is checked here, once. A handle opens one file;
 * where that failed, it may be tried again.
 */
oldmem_guard_status oldmem_guard_open(oldmem_guard *guard, const char *path);

/*
 * Old memory [paddr, paddr + size) is found at `offset` bytes of the file `fd`; after open(). Segments must be whole
 * pages, with OLDMEM_GUARD_MMAP at an offset of whole pages too, and must not overlap. The descriptor is duplicated, so
 * the caller may close it; reads may change the file position that the two share.
 */
oldmem_guard_status oldmem_guard_add_segment(oldmem_guard *guard, int fd, uint64_t offset, uint64_t paddr,
					     uint64_t size, oldmem_guard_how how);

/* Pages are of 1 << *shift bytes. */
oldmem_guard_status oldmem_guard_page_shift(const oldmem_guard *guard, unsigned *shift);

/* Is the page RAM, so that it may be read: 1 or 0. Whether a segment shows it is another question. */
oldmem_guard_status oldmem_guard_is_ram(const oldmem_guard *guard, uint64_t pfn, int *ram);

/* The first pfn of [pfn, end) that is RAM, or that is refused; `end` if there is none. */
oldmem_guard_status oldmem_guard_next_ram(const oldmem_guard *guard, uint64_t pfn, uint64_t end, uint64_t *found);
oldmem_guard_status oldmem_guard_next_refused(const oldmem_guard *guard, uint64_t pfn, uint64_t end,
					      uint64_t *found);

/*
 * is_ram() of the n pages from pfn on: bit i % 64 of words[i / 64] is set where page pfn + i is RAM, and clear
 * elsewhere in the (n + 63) / 64 words. On failure they are left as they are.
 */
oldmem_guard_status oldmem_guard_fill(const oldmem_guard *guard, uint64_t pfn, uint64_t n, uint64_t *words);

/* Index of the rule that refuses the page, or OLDMEM_GUARD_NO_RULE where it is RAM. */
oldmem_guard_status oldmem_guard_why(const oldmem_guard *guard, uint64_t pfn, int *rule);

/* The number of rules. */
oldmem_guard_status oldmem_guard_rules(const oldmem_guard *guard, size_t *n);

/*
 * Of rule `rule`, counted from 0: its name, its reason for refusing (both UTF-8 as oldmem writes them, and in any case
 * without control characters of ASCII; valid until close()), and how many pages reads asked for and it turned into
 * zeros. Results that are not wanted may be NULL.
 */
oldmem_guard_status oldmem_guard_rule(const oldmem_guard *guard, int rule, const char **name, const char **reason,
				      uint64_t *refused);

/*
 * Fill `buffer` with n bytes of old memory from paddr on. Refused pages, pages that no segment shows, that the file is
 * too short for, or that cannot be read, and what lies beyond the last address are zeros, and counted; the rest is
 * served. Fails for a wrong argument only, and leaves the buffer as it is then.
 */
oldmem_guard_status oldmem_guard_read(oldmem_guard *guard, uint64_t paddr, void *buffer, size_t n);

/* Of all reads so far. `size` is sizeof(*counters): a later library fills in no more than the caller knows of. */
oldmem_guard_status oldmem_guard_get_counters(const oldmem_guard *guard, oldmem_guard_counters *counters, size_t size);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
