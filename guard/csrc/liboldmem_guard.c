/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The C ABI of include/oldmem_guard.h over guardfile, gate and physmem. */
#define _GNU_SOURCE
#include "oldmem_guard.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bulk.h"
#include "guardfile.h"
#include "physmem.h"

/* Windows are one reader's at a time; their page tables take 64 KiB each, 1 MiB a context. */
enum { CONTEXTS = 16, WINDOW_SIZE = 32 << 20, LINE = 4096 + 256 };

struct oldmem_guard {
	struct guardfile file;		/* file.map is NULL until open() */
	struct gate gate;
	struct gate all_ram;		/* no rules: what reads of already allowed runs pass */
	const struct gate *allowed;	/* that one, as a context wants it */
	size_t n_segments;
	struct physmem_segment *segments;
	_Atomic uint32_t taken;		/* a bit for each context in use */
	struct physmem contexts[CONTEXTS];
	_Atomic uint64_t *refused;	/* pages, by rule */
	_Atomic uint64_t bytes_read, bytes_refused, pages_refused, pages_failed;
	char error[LINE];
};

__attribute__((format(printf, 3, 4)))
static oldmem_guard_status failed(oldmem_guard *g, oldmem_guard_status status, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(g->error, sizeof(g->error), format, args);
	va_end(args);
	/* a path may have any character; an error is one line */
	for (char *c = g->error; *c; c++)
		if ((unsigned char)*c < ' ' || *c == 0x7f)
			*c = '?';
	return status;
}

static bool is_open(const oldmem_guard *g)
{
	return g && g->file.map;
}

/* One more than the last pfn. */
static uint64_t pfns(const oldmem_guard *g)
{
	return UINT64_C(1) << (64 - g->file.page_shift);
}

const char *oldmem_guard_status_text(oldmem_guard_status status)
{
	static const char *const texts[] = {
		[OLDMEM_GUARD_OK] = "no error",
		[OLDMEM_GUARD_INVALID] = "wrong argument",
		[OLDMEM_GUARD_SYSTEM] = "the system refused it",
		[OLDMEM_GUARD_DAMAGED] = "no compiled guard, or a damaged one",
		[OLDMEM_GUARD_UNSUPPORTED] = "compiled guard of another version or byte order",
		[OLDMEM_GUARD_NO_MEMORY] = "out of memory",
	};

	return (size_t)status < sizeof(texts) / sizeof(*texts) ? texts[status] : "unknown status";
}

oldmem_guard_status oldmem_guard_new(oldmem_guard **guard)
{
	if (!guard)
		return OLDMEM_GUARD_INVALID;
	*guard = calloc(1, sizeof(**guard));
	return *guard ? OLDMEM_GUARD_OK : OLDMEM_GUARD_NO_MEMORY;
}

void oldmem_guard_close(oldmem_guard *guard)
{
	if (!guard)
		return;
	for (int i = 0; i < CONTEXTS; i++)
		physmem_unmap(&guard->contexts[i]);
	for (size_t i = 0; i < guard->n_segments; i++)
		close(guard->segments[i].fd);
	free(guard->segments);
	free(guard->gate.rules);
	free(guard->refused);
	guardfile_close(&guard->file);
	free(guard);
}

const char *oldmem_guard_error(const oldmem_guard *guard)
{
	return guard ? guard->error : oldmem_guard_status_text(OLDMEM_GUARD_NO_MEMORY);
}

/* A context without windows, for the segments that there are. */
static void prepare(oldmem_guard *g, struct physmem *m)
{
	*m = (struct physmem){
		.n = g->n_segments,
		.segments = g->segments,
		.gate = &g->allowed,
		.page_shift = g->file.page_shift,
		.window_size = WINDOW_SIZE,
	};
}

static void prepare_all(oldmem_guard *g)
{
	for (int i = 0; i < CONTEXTS; i++)
		prepare(g, &g->contexts[i]);
}

oldmem_guard_status oldmem_guard_open(oldmem_guard *guard, const char *path)
{
	struct guardfile file;
	struct gate_rule *rules;
	_Atomic uint64_t *refused;
	char why[256];
	int err;

	if (!guard)
		return OLDMEM_GUARD_INVALID;
	if (!path)
		return failed(guard, OLDMEM_GUARD_INVALID, "no path to a compiled guard");
	if (is_open(guard))
		return failed(guard, OLDMEM_GUARD_INVALID, "%s: the handle has a compiled guard already", path);
	err = guardfile_open(&file, path, why, sizeof(why));
	if (err)
		return failed(guard, err == -EBADMSG ? OLDMEM_GUARD_DAMAGED :
			      err == -EPROTONOSUPPORT ? OLDMEM_GUARD_UNSUPPORTED : OLDMEM_GUARD_SYSTEM, "%s: %s", path, why);
	/* one more than there are: a guard without rules is no lack of memory */
	rules = calloc(file.n + 1, sizeof(*rules));
	refused = calloc(file.n + 1, sizeof(*refused));
	if (!rules || !refused) {
		free(rules);
		free(refused);
		guardfile_close(&file);
		return failed(guard, OLDMEM_GUARD_NO_MEMORY, "%s: out of memory", path);
	}
	for (size_t i = 0; i < file.n; i++)
		guardfile_rule(&file, i, &rules[i], NULL, NULL);
	guard->gate = (struct gate){ .n = file.n, .rules = rules };
	guard->allowed = &guard->all_ram;
	guard->refused = refused;
	guard->file = file;
	prepare_all(guard);
	return OLDMEM_GUARD_OK;
}

oldmem_guard_status oldmem_guard_add_segment(oldmem_guard *guard, int fd, uint64_t offset, uint64_t paddr,
					     uint64_t size, oldmem_guard_how how)
{
	unsigned long long p = paddr, s = size, o = offset;
	uint64_t page;
	struct physmem_segment *segments;
	size_t at = 0;
	int own, err;

	if (!guard)
		return OLDMEM_GUARD_INVALID;
	if (!is_open(guard))
		return failed(guard, OLDMEM_GUARD_INVALID, "segment %#llx+%#llx: no compiled guard is open", p, s);
	if (how != OLDMEM_GUARD_PREAD && how != OLDMEM_GUARD_MMAP)
		return failed(guard, OLDMEM_GUARD_INVALID, "segment %#llx+%#llx: neither to be read nor mapped", p, s);
	page = UINT64_C(1) << guard->file.page_shift;
	if ((paddr | size | (how == OLDMEM_GUARD_MMAP ? offset : 0)) & (page - 1))
		return failed(guard, OLDMEM_GUARD_INVALID, "segment %#llx+%#llx at offset %#llx is not whole pages", p, s, o);
	if (!size || size - 1 > UINT64_MAX - paddr || size > INT64_MAX || offset > INT64_MAX - size)
		return failed(guard, OLDMEM_GUARD_INVALID, "segment %#llx+%#llx at offset %#llx is not possible", p, s, o);
	while (at < guard->n_segments && guard->segments[at].paddr < paddr)
		at++;
	if ((at && paddr - guard->segments[at - 1].paddr < guard->segments[at - 1].size) ||
	    (at < guard->n_segments && guard->segments[at].paddr - paddr < size))
		return failed(guard, OLDMEM_GUARD_INVALID, "segment %#llx+%#llx overlaps one that is there", p, s);
	err = how == OLDMEM_GUARD_MMAP ? -physmem_catch_sigbus() : 0;
	if (err)
		return failed(guard, OLDMEM_GUARD_SYSTEM, "cannot catch SIGBUS: %s", strerror(err));
	own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (own < 0)
		return failed(guard, OLDMEM_GUARD_SYSTEM, "segment %#llx+%#llx: %s", p, s, strerror(errno));
	/* windows point to the segments, which are about to move */
	for (int i = 0; i < CONTEXTS; i++)
		physmem_unmap(&guard->contexts[i]);
	segments = realloc(guard->segments, (guard->n_segments + 1) * sizeof(*segments));
	if (!segments) {
		close(own);
		return failed(guard, OLDMEM_GUARD_NO_MEMORY, "segment %#llx+%#llx: out of memory", p, s);
	}
	guard->segments = segments;
	memmove(segments + at + 1, segments + at, (guard->n_segments - at) * sizeof(*segments));
	segments[at] = (struct physmem_segment){
		.paddr = paddr,
		.size = size,
		.offset = offset,
		.fd = own,
		.how = how == OLDMEM_GUARD_MMAP ? PHYSMEM_MMAP : PHYSMEM_PREAD,
	};
	guard->n_segments++;
	prepare_all(guard);
	return OLDMEM_GUARD_OK;
}

oldmem_guard_status oldmem_guard_page_shift(const oldmem_guard *guard, unsigned *shift)
{
	if (shift)
		*shift = 0;
	if (!is_open(guard) || !shift)
		return OLDMEM_GUARD_INVALID;
	*shift = guard->file.page_shift;
	return OLDMEM_GUARD_OK;
}

oldmem_guard_status oldmem_guard_is_ram(const oldmem_guard *guard, uint64_t pfn, int *ram)
{
	if (ram)
		*ram = 0;
	if (!is_open(guard) || !ram || pfn >= pfns(guard))
		return OLDMEM_GUARD_INVALID;
	*ram = gate_is_ram(&guard->gate, pfn);
	return OLDMEM_GUARD_OK;
}

static oldmem_guard_status next(const oldmem_guard *g, uint64_t pfn, uint64_t end, bool ram, uint64_t *found)
{
	if (found)
		*found = 0;
	if (!is_open(g) || !found || pfn > end || end > pfns(g))
		return OLDMEM_GUARD_INVALID;
	*found = gate_next(&g->gate, pfn, end, ram);
	return OLDMEM_GUARD_OK;
}

oldmem_guard_status oldmem_guard_next_ram(const oldmem_guard *guard, uint64_t pfn, uint64_t end, uint64_t *found)
{
	return next(guard, pfn, end, true, found);
}

oldmem_guard_status oldmem_guard_next_refused(const oldmem_guard *guard, uint64_t pfn, uint64_t end, uint64_t *found)
{
	return next(guard, pfn, end, false, found);
}

oldmem_guard_status oldmem_guard_fill(const oldmem_guard *guard, uint64_t pfn, uint64_t n, uint64_t *words)
{
	if (!is_open(guard) || (n && !words) || pfn > pfns(guard) || n > pfns(guard) - pfn)
		return OLDMEM_GUARD_INVALID;
	if (n)
		gate_fill(&guard->gate, pfn, n, words);
	return OLDMEM_GUARD_OK;
}

oldmem_guard_status oldmem_guard_why(const oldmem_guard *guard, uint64_t pfn, int *rule)
{
	if (rule)
		*rule = OLDMEM_GUARD_NO_RULE;
	if (!is_open(guard) || !rule || pfn >= pfns(guard))
		return OLDMEM_GUARD_INVALID;
	*rule = gate_refuser(&guard->gate, pfn);
	return OLDMEM_GUARD_OK;
}

oldmem_guard_status oldmem_guard_rules(const oldmem_guard *guard, size_t *n)
{
	if (n)
		*n = 0;
	if (!is_open(guard) || !n)
		return OLDMEM_GUARD_INVALID;
	*n = guard->gate.n;
	return OLDMEM_GUARD_OK;
}

oldmem_guard_status oldmem_guard_rule(const oldmem_guard *guard, int rule, const char **name, const char **reason,
				      uint64_t *refused)
{
	bool good = is_open(guard) && rule >= 0 && (size_t)rule < guard->gate.n;

	if (name)
		*name = NULL;
	if (reason)
		*reason = NULL;
	if (good)
		guardfile_rule(&guard->file, (size_t)rule, NULL, name, reason);
	if (refused)
		*refused = good ? atomic_load_explicit(&guard->refused[rule], memory_order_relaxed) : 0;
	return good ? OLDMEM_GUARD_OK : OLDMEM_GUARD_INVALID;
}

static void count(_Atomic uint64_t *counter, uint64_t n)
{
	if (n)
		atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* As physmem_read(), with this context, but the counters are those that all threads share. */
static void read_with(oldmem_guard *g, struct physmem *m, uint64_t paddr, uint8_t *to, size_t n)
{
	const uint32_t shift = g->file.page_shift;
	struct physmem_tally mine = { 0 };

	m->tally = &mine;
	while (n) {
		int refuser;
		uint64_t pfn = paddr >> shift, last = paddr + n - 1;
		uint64_t end = gate_run(&g->gate, pfn, (last >> shift) + 1, &refuser);
		/* an end at 2^64 wraps to 0, and so does what is subtracted from it */
		uint64_t bytes = (end << shift) - paddr;
		size_t piece = bytes < n ? (size_t)bytes : n;

		if (refuser >= 0) {
			memset(to, 0, piece);
			count(&g->refused[refuser], end - pfn);
			count(&g->pages_refused, end - pfn);
			count(&g->bytes_refused, piece);
		} else {
			physmem_read(m, paddr, to, piece);
		}
		paddr += piece;
		to += piece;
		n -= piece;
	}
	count(&g->bytes_read, mine.bytes_read);
	count(&g->pages_failed, mine.fault_pages);
	m->tally = NULL;
}

/* More readers than contexts: rather than wait, one maps what it needs for itself. */
static __attribute__((noinline)) void read_alone(oldmem_guard *g, uint64_t paddr, void *to, size_t n)
{
	struct physmem m;

	prepare(g, &m);
	read_with(g, &m, paddr, to, n);
	physmem_unmap(&m);
}

oldmem_guard_status oldmem_guard_read(oldmem_guard *guard, uint64_t paddr, void *buffer, size_t n)
{
	uint32_t taken, mine;
	uint8_t *to = buffer;

	if (!is_open(guard) || (n && !buffer))
		return OLDMEM_GUARD_INVALID;
	if (n && n - 1 > UINT64_MAX - paddr) {
		size_t inside = (size_t)(UINT64_MAX - paddr) + 1;

		memset(to + inside, 0, n - inside);
		n = inside;
	}
	taken = atomic_load_explicit(&guard->taken, memory_order_relaxed);
	do {
		mine = ~taken & (taken + 1);	/* the lowest that is free: its windows are the warmest */
		if (mine >> CONTEXTS) {
			read_alone(guard, paddr, to, n);
			return OLDMEM_GUARD_OK;
		}
	} while (!atomic_compare_exchange_weak_explicit(&guard->taken, &taken, taken | mine, memory_order_acquire,
							memory_order_relaxed));
	read_with(guard, &guard->contexts[__builtin_ctz(mine)], paddr, to, n);
	atomic_fetch_and_explicit(&guard->taken, ~mine, memory_order_release);
	return OLDMEM_GUARD_OK;
}

oldmem_guard_status oldmem_guard_get_counters(const oldmem_guard *guard, oldmem_guard_counters *counters, size_t size)
{
	oldmem_guard_counters now;

	if (counters)
		memset(counters, 0, size);
	if (!is_open(guard) || !counters)
		return OLDMEM_GUARD_INVALID;
	now = (oldmem_guard_counters){
		.bytes_read = atomic_load_explicit(&guard->bytes_read, memory_order_relaxed),
		.bytes_refused = atomic_load_explicit(&guard->bytes_refused, memory_order_relaxed),
		.pages_refused = atomic_load_explicit(&guard->pages_refused, memory_order_relaxed),
		.pages_failed = atomic_load_explicit(&guard->pages_failed, memory_order_relaxed),
	};
	memcpy(counters, &now, size < sizeof(now) ? size : sizeof(now));
	return OLDMEM_GUARD_OK;
}
