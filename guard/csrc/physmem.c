/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "physmem.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/*
 * A mapped page that the hardware or the file system cannot deliver raises SIGBUS. A signal handler has no argument
 * to find its context by, hence the one piece of state outside the structure: where this thread wants to land.
 */
static __thread sigjmp_buf *volatile landing;
static struct sigaction earlier;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	if (landing)
		siglongjmp(*landing, 1);
	if (earlier.sa_flags & SA_SIGINFO) {
		earlier.sa_sigaction(sig, info, context);
	} else if (earlier.sa_handler != SIG_DFL && earlier.sa_handler != SIG_IGN) {
		earlier.sa_handler(sig);
	} else {
		/* not ours: back to the default action, which the returning instruction raises again */
		signal(SIGBUS, SIG_DFL);
	}
}

int physmem_catch_sigbus(void)
{
	struct sigaction now, action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER };

	if (sigaction(SIGBUS, NULL, &now))
		return -errno;
	if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus)
		return 0;
	earlier = now;
	return sigaction(SIGBUS, &action, NULL) ? -errno : 0;
}

static int copy_mapped(void *to, const void *from, size_t n)
{
	sigjmp_buf here;

	if (sigsetjmp(here, 0)) {
		landing = NULL;
		return -EFAULT;
	}
	landing = &here;
	memcpy(to, from, n);
	landing = NULL;
	return 0;
}

static int copy_pread(int fd, uint64_t offset, uint8_t *to, size_t n)
{
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

/* One page through a mapping of its own: for windows in which some other page cannot be mapped. */
static int copy_one_page(const struct physmem *m, const struct physmem_segment *s, uint64_t at, void *to, size_t n)
{
	uint64_t page = UINT64_C(1) << m->page_shift, inside = at & (page - 1);
	uint8_t *map = mmap(NULL, page, PROT_READ, MAP_SHARED, s->fd, (off_t)(s->offset + at - inside));
	int err;

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

	if (s->how == PHYSMEM_PREAD)
		return copy_pread(s->fd, s->offset + at, to, *n);
	w = window_at(m, s, at);
	if (!w)
		return -errno;
	w->used = ++m->clock;
	if (*n > w->start + w->size - at)
		*n = w->start + w->size - at;
	return copy_mapped(to, w->map + (at - w->start), *n);
}

static const struct physmem_segment *segment_at(const struct physmem *m, uint64_t paddr, uint64_t *next)
{
	size_t low = 0, high = m->n;

	while (low < high) {
		size_t mid = low + (high - low) / 2;

		if (m->segments[mid].paddr + m->segments[mid].size > paddr)
			high = mid;
		else
			low = mid + 1;
	}
	if (low == m->n) {
		*next = UINT64_MAX;
		return NULL;
	}
	if (m->segments[low].paddr > paddr) {
		*next = m->segments[low].paddr;
		return NULL;
	}
	*next = m->segments[low].paddr + m->segments[low].size;
	return &m->segments[low];
}

static void log_fault(struct physmem *m, uint64_t first, uint64_t end, int error)
{
	m->fault_pages += end - first;
	for (size_t i = 0; i < m->n_faults; i++) {
		struct physmem_fault *f = &m->faults[i];

		if (f->error == error && first >= f->first && first <= f->end) {
			if (end > f->end)
				f->end = end;
			return;
		}
	}
	if (m->n_faults < m->max_faults)
		m->faults[m->n_faults++] = (struct physmem_fault){ first, end, error };
}

/*
 * Copy RAM that the gate allows. With `strict` the first unreadable byte ends it (*bad, -errno); otherwise an
 * unreadable page becomes zeros and a log entry.
 */
static int copy_ram(struct physmem *m, uint64_t paddr, uint8_t *to, size_t n, bool strict, uint64_t *bad)
{
	const uint64_t page = UINT64_C(1) << m->page_shift;

	while (n) {
		uint64_t next, at;
		const struct physmem_segment *s = segment_at(m, paddr, &next);
		size_t piece = next - paddr < n ? (size_t)(next - paddr) : n;
		int err = -ENXIO;

		if (s) {
			at = paddr - s->paddr;
			err = copy_piece(m, s, at, to, &piece);
			if (err) {
				/* once more, page by page, to lose no more than what really fails */
				size_t left = page - (paddr & (page - 1));

				piece = left < piece ? left : piece;
				err = s->how == PHYSMEM_MMAP ? copy_one_page(m, s, at, to, piece)
							     : copy_pread(s->fd, s->offset + at, to, piece);
			}
		}
		if (err && strict) {
			*bad = paddr;
			return err;
		}
		if (err) {
			memset(to, 0, piece);
			log_fault(m, paddr >> m->page_shift, (paddr + piece + page - 1) >> m->page_shift, -err);
		} else if (!strict) {
			m->bytes_read += piece;
		}
		paddr += piece;
		to += piece;
		n -= piece;
	}
	return 0;
}

static uint64_t last_pfn_end(const struct physmem *m, uint64_t paddr, size_t n)
{
	return ((paddr + n - 1) >> m->page_shift) + 1;
}

void physmem_read(struct physmem *m, uint64_t paddr, void *buf, size_t n)
{
	uint8_t *to = buf;

	while (n) {
		int refuser;
		uint64_t pfn = paddr >> m->page_shift;
		uint64_t end = gate_run(m->gate, pfn, last_pfn_end(m, paddr, n), &refuser);
		uint64_t bytes = (end << m->page_shift) - paddr;
		size_t piece = bytes < n ? (size_t)bytes : n;
		uint64_t bad;

		if (refuser >= 0) {
			memset(to, 0, piece);
			m->gate->rules[refuser].refused += end - pfn;
			m->bytes_refused += piece;
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
	if (paddr + n < paddr)
		return -EINVAL;
	pfn = paddr >> m->page_shift;
	end = last_pfn_end(m, paddr, n);
	hole = gate_next(m->gate, pfn, end, false);
	if (hole < end) {
		if (hole > pfn)
			*bad = hole << m->page_shift;
		return -EACCES;
	}
	return copy_ram(m, paddr, buf, n, true, bad);
}

void physmem_unmap(struct physmem *m)
{
	for (int i = 0; i < PHYSMEM_WINDOWS; i++)
		unmap_window(&m->windows[i]);
}
