/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "physmem.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "after.h"
#include "sigbus.h"

enum {
	WORTH_ASKING = 1 << 16,	/* bytes; below that a read costs no more than the question */
	FAULT_UNIT = 4096,	/* bytes that si_addr may be rounded down to: s390x tells no more */
};

/*
 * A mapped page that the hardware or the file system cannot deliver raises SIGBUS. A signal handler has no argument
 * to find its context by, hence the one piece of state outside the structure: where this thread wants to land. It is
 * looked at in the handler of threads that never were here: a model that allocates on first use would not do.
 */
struct landing {
	sigjmp_buf here;
	uintptr_t from, end;	/* of what is copied */
};

static __thread struct landing *volatile landing __attribute__((tls_model("initial-exec")));

static bool failed_to_copy(const siginfo_t *info, void *context)
{
	const struct landing *l = landing;
	uintptr_t at = (uintptr_t)info->si_addr, unit = FAULT_UNIT;

	if (!l || !sigbus_is_fault(info))
		return false;
	if (info->si_code == BUS_MCEERR_AR && info->si_addr_lsb > 0 && info->si_addr_lsb < 64)
		unit = (uintptr_t)1 << info->si_addr_lsb;
	/* a fault in the caller's buffer is the caller's */
	if (at < (l->from & ~(unit - 1)) || at >= l->end)
		return false;
	/*
	 * Out of a handler the jump takes its mask along: SA_NODEFER keeps SIGBUS itself out of it, but not what
	 * ThreadSanitizer or a wrapper of sigaction(2) has added. Here, where a page has failed, it costs nothing. Linux
	 * has a mask for each thread, and sigprocmask() sets the caller's.
	 */
	sigprocmask(SIG_SETMASK, &((const ucontext_t *)context)->uc_sigmask, NULL);
	siglongjmp(landing->here, 1);
}

int physmem_catch_sigbus(void)
{
	return sigbus_catch(failed_to_copy);
}

static int copy_mapped(void *to, const void *from, size_t n)
{
	struct landing l = { .from = (uintptr_t)from, .end = (uintptr_t)from + n };

	if (sigsetjmp(l.here, 0)) {
		landing = NULL;
		return -EFAULT;
	}
	landing = &l;
	/* the copy must stay between the two, wherever the compiler would like to have it */
	atomic_signal_fence(memory_order_seq_cst);
	memcpy(to, from, n);
	atomic_signal_fence(memory_order_seq_cst);
	landing = NULL;
	return 0;
}

/*
 * True if the file is sparse there: many gigabytes of an image may be holes, and reading them fills the page cache.
 * A file that ends there has no hole but an end; one that cannot tell (a device, /proc/vmcore) is read.
 */
static bool is_hole(int fd, uint64_t offset, size_t n)
{
	off_t data = lseek(fd, (off_t)offset, SEEK_DATA);

	if (data >= 0)
		return (uint64_t)data >= offset + n;
	return errno == ENXIO && lseek(fd, 0, SEEK_END) >= (off_t)(offset + n);
}

static int copy_pread(int fd, uint64_t offset, uint8_t *to, size_t n)
{
	if (n >= WORTH_ASKING && is_hole(fd, offset, n)) {
		memset(to, 0, n);
		return 0;
	}
	while (n) {
		ssize_t got = pread(fd, to, n, (off_t)offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (got == 0)
			return -ENODATA;	/* the file is shorter than its segment */
		to += got;
		offset += (uint64_t)got;
		n -= (size_t)got;
	}
	return 0;
}

static int copy_read(const struct physmem *m, const struct physmem_segment *s, uint64_t at, void *to, size_t n)
{
	if (s->how == PHYSMEM_CORE)
		return corefile_read(m->core, s->offset + at, to, n);
	return copy_pread(s->fd, s->offset + at, to, n);
}

static void unmap_window(struct physmem_window *w)
{
	if (w->segment)
		munmap((void *)w->map, w->size);
	w->segment = NULL;
}

/* The mapped window around byte `at` of the segment, or NULL with errno set. */
static struct physmem_window *window_at(struct physmem *m, const struct physmem_segment *s, uint64_t at)
{
	struct physmem_window *oldest = &m->windows[0];
	uint64_t start = at & ~(m->window_size - 1);
	uint64_t size = s->size - start < m->window_size ? s->size - start : m->window_size;
	void *map;

	for (int i = 0; i < PHYSMEM_WINDOWS; i++) {
		struct physmem_window *w = &m->windows[i];

		if (w->segment == s && w->start == start)
			return w;
		if (!w->segment || (oldest->segment && w->used < oldest->used))
			oldest = w;
	}
	unmap_window(oldest);
	map = mmap(NULL, size, PROT_READ, MAP_SHARED, s->fd, (off_t)(s->offset + start));
	if (map == MAP_FAILED)
		return NULL;
	*oldest = (struct physmem_window){ .segment = s, .start = start, .size = size, .map = map };
	return oldest;
}

/* Part of one page, with a mapping of its own: in its window some other page may refuse to be mapped. */
static int copy_one_page(const struct physmem *m, const struct physmem_segment *s, uint64_t at, void *to, size_t n)
{
	uint64_t page = UINT64_C(1) << m->page_shift, inside = at & (page - 1);
	uint8_t *map;
	int err;

	if (s->how != PHYSMEM_MMAP)
		return copy_read(m, s, at, to, n);
	map = mmap(NULL, page, PROT_READ, MAP_SHARED, s->fd, (off_t)(s->offset + at - inside));
	if (map == MAP_FAILED)
		return -errno;
	err = copy_mapped(to, map + inside, n);
	munmap(map, page);
	return err;
}

/* Copy [at, at + *n) of the segment; *n shrinks to what one window serves. 0 or -errno, then the piece is undefined. */
static int copy_piece(struct physmem *m, const struct physmem_segment *s, uint64_t at, uint8_t *to, size_t *n)
{
	struct physmem_window *w;

	if (s->how != PHYSMEM_MMAP)
		return copy_read(m, s, at, to, *n);
	w = window_at(m, s, at);
	if (!w)
		return -errno;
	w->used = ++m->clock;
	if (*n > w->start + w->size - at)
		*n = w->start + w->size - at;
	return copy_mapped(to, w->map + (at - w->start), *n);
}

/* The segment that holds paddr, or NULL; *left bytes from paddr on have the same answer. */
static const struct physmem_segment *segment_at(const struct physmem *m, uint64_t paddr, uint64_t *left)
{
	size_t i = segment_after(m->segments, m->n, paddr);
	const struct physmem_segment *s = &m->segments[i];

	if (i == m->n) {
		*left = UINT64_MAX;
		return NULL;
	}
	if (s->paddr > paddr) {
		*left = s->paddr - paddr;
		return NULL;
	}
	*left = s->size - (paddr - s->paddr);
	return s;
}

static uint64_t last_pfn_end(const struct physmem *m, uint64_t paddr, size_t n)
{
	return ((paddr + n - 1) >> m->page_shift) + 1;
}

/*
 * Copy RAM that the gate allows. With `strict` the first unreadable byte ends it (*bad, -errno); otherwise an
 * unreadable page becomes zeros and a log entry.
 */
static int copy_ram(struct physmem *m, uint64_t paddr, uint8_t *to, size_t n, bool strict, uint64_t *bad)
{
	const uint64_t page = UINT64_C(1) << m->page_shift;
	size_t careful = 0;	/* bytes to go page by page after a failure: no more is lost than what really fails */

	while (n) {
		uint64_t left;
		const struct physmem_segment *s = segment_at(m, paddr, &left);
		size_t piece = left < n ? (size_t)left : n;
		bool in_file = s && s->how != PHYSMEM_ABSENT;
		int err = s ? -ENODATA : -ENXIO;

		if (in_file && !careful) {
			err = copy_piece(m, s, paddr - s->paddr, to, &piece);
			if (err)
				careful = piece;
		}
		if (in_file && careful) {
			left = page - (paddr & (page - 1));
			piece = left < piece ? (size_t)left : piece;
			careful -= piece < careful ? piece : careful;
			err = copy_one_page(m, s, paddr - s->paddr, to, piece);
		}
		if (err && strict) {
			*bad = paddr;
			return err;
		}
		if (err) {
			memset(to, 0, piece);
			tally_failed(m->tally, m->log, paddr >> m->page_shift, last_pfn_end(m, paddr, piece), -err);
		} else if (!strict) {
			tally_add(&m->tally->bytes_read, piece);
		}
		paddr += piece;
		to += piece;
		n -= piece;
	}
	return 0;
}

static const struct gate *gate_in_force(const struct physmem *m)
{
	return __atomic_load_n(m->gate, __ATOMIC_ACQUIRE);
}

static void count_refused(const struct gate_rule *rule, uint64_t pages)
{
	if (rule->refused)
		tally_add(rule->refused, pages);
}

void physmem_read(struct physmem *m, uint64_t paddr, void *buf, size_t n)
{
	uint8_t *to = buf;

	if (n && n - 1 > UINT64_MAX - paddr) {
		size_t inside = (size_t)(UINT64_MAX - paddr) + 1;

		memset(to + inside, 0, n - inside);
		n = inside;
	}
	while (n) {
		int refuser;
		const struct gate *gate = gate_in_force(m);
		uint64_t pfn = paddr >> m->page_shift;
		uint64_t end = gate_run(gate, pfn, last_pfn_end(m, paddr, n), &refuser);
		uint64_t bytes = (end << m->page_shift) - paddr;
		size_t piece = bytes < n ? (size_t)bytes : n;
		uint64_t bad;

		if (refuser >= 0) {
			memset(to, 0, piece);
			count_refused(&gate->rules[refuser], end - pfn);
			tally_add(&m->tally->bytes_refused, piece);
		} else {
			copy_ram(m, paddr, to, piece, false, &bad);
		}
		paddr += piece;
		to += piece;
		n -= piece;
	}
}

int physmem_read_exact(struct physmem *m, uint64_t paddr, void *buf, size_t n, uint64_t *bad)
{
	uint64_t pfn, end, hole;

	if (!n)
		return 0;
	*bad = paddr;
	if (n - 1 > UINT64_MAX - paddr)
		return -EINVAL;
	pfn = paddr >> m->page_shift;
	end = last_pfn_end(m, paddr, n);
	hole = gate_next(gate_in_force(m), pfn, end, false);
	if (hole < end) {
		if (hole > pfn)
			*bad = hole << m->page_shift;
		return -EACCES;
	}
	return copy_ram(m, paddr, buf, n, true, bad);
}

void physmem_rest(struct physmem *m)
{
	if (m->core)
		corefile_rest(m->core);
}

bool physmem_at_rest(const struct physmem *m)
{
	return !m->core || m->core->fd < 0;
}

void physmem_unmap(struct physmem *m)
{
	for (int i = 0; i < PHYSMEM_WINDOWS; i++)
		unmap_window(&m->windows[i]);
}
