/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "compose.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "after.h"
#include "guardfile.h"

enum { MAPPED = 1024, KEPT = 4, HIGH_FD = 256, ZERO_FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE };

/* A range that compose() made. The signal handler reads these: end is written last, and 0 while the rest changes. */
struct mapped {
	_Atomic uintptr_t start, end;
	_Atomic uint64_t offset;	/* in the vmcore */
};

static struct mapped mapped[MAPPED];
static _Atomic int n_mapped;	/* places from here on have never been used */
static pthread_mutex_t mapped_lock = PTHREAD_MUTEX_INITIALIZER;
static const struct composer *handler_composer;

/*
 * Files of the plan's process, open: to open one by way of /proc costs as much as to map a megabyte. A collector may
 * close what it never opened (closefrom(3)), and the number may be another file's then: each use asks.
 */
static struct kept {
	int64_t of;	/* descriptor in the plan's process */
	int fd;
	dev_t dev;
	ino_t ino;
	bool there;
} kept[KEPT];
static pthread_mutex_t kept_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction earlier;

static const void *part(const struct composer *c, uint64_t offset)
{
	return (const uint8_t *)c->plan + offset;
}

static uint64_t page_size(const struct composer *c)
{
	return UINT64_C(1) << c->plan->page_shift;
}

static void count(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static void log_fault(const struct composer *c, uint64_t paddr, uint64_t n, int error)
{
	unsigned shift = (unsigned)c->plan->page_shift;
	struct physmem_fault *faults = c->tally->faults, fault = { paddr >> shift, (paddr + n) >> shift, error };
	uint64_t known = __atomic_load_n(&c->tally->n_faults, __ATOMIC_RELAXED), i;

	/* what is mapped again and again must not fill the log */
	for (i = 0; i < known && i < PLAN_FAULTS; i++)
		if (faults[i].error == error && faults[i].first <= fault.first && fault.end <= faults[i].end)
			return;
	i = __atomic_fetch_add(&c->tally->n_faults, 1, __ATOMIC_RELAXED);
	if (i < PLAN_FAULTS)
		faults[i] = fault;
}

static uint64_t extent_at(const struct composer *c, uint64_t offset)
{
	return extent_after(part(c, c->plan->extents), c->plan->n_extents, offset);
}

static uint64_t segment_at(const struct composer *c, uint64_t paddr)
{
	return segment_after(part(c, c->plan->segments), c->plan->n_segments, paddr);
}

int compose_reopen(const struct composer *c, int64_t fd, int flags)
{
	char path[64];
	int opened;

	snprintf(path, sizeof(path), "/proc/%lld/fd/%lld", (long long)c->plan->pid, (long long)fd);
	do
		opened = c->libc->open(path, flags | O_CLOEXEC);
	while (opened < 0 && errno == EINTR);
	return opened < 0 ? -errno : opened;
}

/*
 * A page of ours that cannot be delivered. The instruction that wanted it finds zeros when it is tried again. Only what
 * is async-signal-safe is called.
 */
static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	const struct composer *c = handler_composer;
	uintptr_t at = (uintptr_t)info->si_addr & ~(uintptr_t)(page_size(c) - 1);
	int saved = errno;

	for (int i = 0; i < n_mapped; i++) {
		uintptr_t end = atomic_load_explicit(&mapped[i].end, memory_order_acquire);
		uintptr_t start = atomic_load_explicit(&mapped[i].start, memory_order_relaxed);
		uint64_t offset = mapped[i].offset, e;

		if (at < start || at >= end)
			continue;
		if (c->libc->mmap((void *)at, page_size(c), PROT_READ, ZERO_FLAGS | MAP_FIXED, -1, 0) == MAP_FAILED)
			break;
		offset += at - start;
		e = extent_at(c, offset);
		if (e < c->plan->n_extents) {
			const struct view_extent *extent = (const struct view_extent *)part(c, c->plan->extents) + e;

			log_fault(c, extent->paddr + (offset - extent->offset), page_size(c), EFAULT);
		}
		errno = saved;
		return;
	}
	if (earlier.sa_flags & SA_SIGINFO)
		earlier.sa_sigaction(sig, info, context);
	else if (earlier.sa_handler != SIG_DFL && earlier.sa_handler != SIG_IGN)
		earlier.sa_handler(sig);
	else
		signal(SIGBUS, SIG_DFL);	/* the returning instruction raises it again */
}

static int catch_sigbus(const struct composer *c)
{
	struct sigaction now, action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART };

	if (sigaction(SIGBUS, NULL, &now))
		return -errno;
	if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus)
		return 0;
	earlier = now;
	handler_composer = c;
	return sigaction(SIGBUS, &action, NULL) ? -errno : 0;
}

/* Without a free place a fault in the range stays what it is without us: the end of the program. */
static void remember(uintptr_t start, uintptr_t end, uint64_t offset)
{
	for (int i = 0; i < MAPPED; i++) {
		if (mapped[i].end)
			continue;
		mapped[i].start = start;
		mapped[i].offset = offset;
		atomic_store_explicit(&mapped[i].end, end, memory_order_release);
		if (i >= n_mapped)
			n_mapped = i + 1;
		return;
	}
}

void compose_forget(const void *at, size_t n)
{
	uintptr_t from = (uintptr_t)at, to = from + n;

	pthread_mutex_lock(&mapped_lock);
	for (int i = 0, n = n_mapped; i < n; i++) {
		uintptr_t start = mapped[i].start, end = mapped[i].end;
		uint64_t offset = mapped[i].offset;

		if (to <= start || from >= end)
			continue;
		mapped[i].end = 0;
		if (start < from)
			remember(start, from, offset);
		if (to < end)
			remember(to, end, offset + (to - start));
	}
	pthread_mutex_unlock(&mapped_lock);
}

/* One call of compose(), under way. */
struct laying {
	struct composer *c;
	uint8_t *at;
	enum compose_how how;
	unsigned pieces;	/* left */
	bool ended;		/* by what is no page's fault: no room for mappings, no way to the files any more */
};

static bool still_there(const struct composer *c, const struct kept *k)
{
	struct stat st;

	return k->there && !c->libc->fstat(k->fd, &st) && st.st_dev == k->dev && st.st_ino == k->ino;
}

/* The file that is `of` in the plan's process; the caller has kept_lock, and holds it while it uses the descriptor. */
static int kept_file(const struct composer *c, int64_t of)
{
	struct kept *k = kept;
	struct stat st;
	int fd, high;

	for (int i = 0; i < KEPT; i++) {
		if (kept[i].of == of && still_there(c, kept + i))
			return kept[i].fd;
		if (!kept[i].there || kept[i].of == of)
			k = kept + i;
	}
	if (k->of != of && still_there(c, k))
		c->libc->close(k->fd);
	k->there = false;
	fd = compose_reopen(c, of, O_RDONLY);
	if (fd < 0)
		return fd;
	/* out of the way of programs that count on the lowest number */
	high = fcntl(fd, F_DUPFD_CLOEXEC, HIGH_FD);
	if (high >= 0) {
		c->libc->close(fd);
		fd = high;
	}
	if (c->libc->fstat(fd, &st)) {
		c->libc->close(fd);
		return -EIO;
	}
	*k = (struct kept){ of, fd, st.st_dev, st.st_ino, true };
	return fd;
}

/* As mmap(2) of a file of the plan's process. */
static void *map_at(struct laying *l, void *at, uint64_t n, int fixed, int64_t of, uint64_t offset)
{
	void *map = MAP_FAILED;
	int fd;

	pthread_mutex_lock(&kept_lock);
	fd = kept_file(l->c, of);
	if (fd >= 0)
		map = l->c->libc->mmap(at, n, PROT_READ, MAP_SHARED | MAP_NORESERVE | fixed, fd, (off_t)offset);
	else
		errno = fd == -ENOENT ? EIO : -fd;	/* "oldmem run" is gone: that is no file's absence */
	pthread_mutex_unlock(&kept_lock);
	if (map == MAP_FAILED)
		l->ended = fd < 0 || errno == ENOMEM;
	return map;
}

static int map_file(struct laying *l, int64_t fd, uint64_t file_offset, uint8_t *to, uint64_t n)
{
	void *map = map_at(l, to, n, MAP_FIXED, fd, file_offset);

	if (map == MAP_FAILED)
		return -errno;
	l->pieces--;
	return 0;
}

/*
 * RAM [paddr, paddr + *n) at `to`; *n shrinks where the pieces are used up. A page that some driver or the kernel keeps
 * from being mapped must not cost those beside it: what fails is halved until it is one page.
 */
static int lay_ram(struct laying *l, uint64_t paddr, uint8_t *to, uint64_t *n)
{
	const struct physmem_segment *segments = part(l->c, l->c->plan->segments);
	const uint64_t page = page_size(l->c);
	uint64_t done = 0, most = *n;

	while (done < *n) {
		uint64_t i = segment_at(l->c, paddr + done), piece = *n - done;
		const struct physmem_segment *s = segments + i;
		int err;

		if (i == l->c->plan->n_segments || s->paddr > paddr + done) {
			if (i < l->c->plan->n_segments && s->paddr - (paddr + done) < piece)
				piece = s->paddr - (paddr + done);
			log_fault(l->c, paddr + done, piece, ENXIO);
			done += piece;
			continue;
		}
		if (s->how == PHYSMEM_ABSENT) {
			if (piece > s->size - (paddr + done - s->paddr))
				piece = s->size - (paddr + done - s->paddr);
			log_fault(l->c, paddr + done, piece, ENODATA);
			done += piece;
			continue;
		}
		if (!l->pieces) {
			*n = done;
			return 0;
		}
		if (piece > s->size - (paddr + done - s->paddr))
			piece = s->size - (paddr + done - s->paddr);
		if (piece > most)
			piece = most;
		err = map_file(l, s->fd, s->offset + (paddr + done - s->paddr), to + done, piece);
		if (err && (l->how == COMPOSE_ALL || l->ended))
			return err;
		if (err && piece > page) {
			most = piece / 2 / page * page;
			continue;
		}
		if (err)
			log_fault(l->c, paddr + done, piece, -err);
		else
			count(&l->c->tally->pages_shown, piece >> l->c->plan->page_shift);
		most = err ? page : most > *n / 2 ? *n : most * 2;
		done += piece;
	}
	return 0;
}

static int lay_extent(struct laying *l, uint64_t paddr, uint8_t *to, uint64_t *n)
{
	const unsigned shift = (unsigned)l->c->plan->page_shift;
	uint64_t done = 0;

	while (done < *n) {
		uint64_t pfn = (paddr + done) >> shift, wanted;
		int refuser, err;
		uint64_t run = gate_run(&l->c->gate, pfn, (paddr + *n) >> shift, &refuser) - pfn;

		if (refuser >= 0) {
			count(&l->c->tally->refused[refuser], run);
			done += run << shift;
			continue;
		}
		if (!l->pieces)
			break;
		wanted = run << shift;
		err = lay_ram(l, paddr + done, to + done, &wanted);
		if (err)
			return err;
		done += wanted;
		if (wanted < run << shift)
			break;
	}
	*n = done;
	return 0;
}

/* [offset, offset + *n) over the zero pages at l->at; *n shrinks where the pieces are used up. */
static int lay(struct laying *l, uint64_t offset, uint64_t *n)
{
	const struct plan *plan = l->c->plan;
	const struct view_extent *extents = part(l->c, plan->extents);
	const uint64_t page = page_size(l->c), start = offset, end = offset + *n;
	const uint64_t head_end = (plan->head_size + page - 1) / page * page;

	if (offset < head_end) {
		uint64_t piece = (head_end < end ? head_end : end) - offset;
		int err = map_file(l, plan->plan_fd, plan->head + offset, l->at, piece);

		if (err)
			return err;
		offset += piece;
	}
	for (uint64_t i = extent_at(l->c, offset); i < plan->n_extents && extents[i].offset < end; i++) {
		const struct view_extent *e = extents + i;
		uint64_t piece, wanted;
		int err;

		if (offset < e->offset)
			offset = e->offset;
		wanted = piece = (e->offset + e->size < end ? e->offset + e->size : end) - offset;
		err = lay_extent(l, e->paddr + (offset - e->offset), l->at + (offset - start), &piece);
		if (err)
			return err;
		offset += piece;
		if (piece < wanted) {
			*n = offset - start;
			return 0;
		}
	}
	return 0;
}

/*
 * The common case, all of [offset, offset + n) in one piece of one file, needs no zero pages below it. False where it is
 * not that case, or did not work: then it is done piece by piece.
 */
static bool lay_whole(struct laying *l, void **at, uint64_t offset, uint64_t n, int fixed)
{
	const struct plan *plan = l->c->plan;
	const struct view_extent *e = part(l->c, plan->extents);
	const struct physmem_segment *s = part(l->c, plan->segments);
	uint64_t i = extent_at(l->c, offset), paddr, first, end;
	int refuser;
	void *map;

	e += i;
	if (i == plan->n_extents || offset < e->offset || n > e->size - (offset - e->offset))
		return false;
	paddr = e->paddr + (offset - e->offset);
	first = paddr >> plan->page_shift;
	end = (paddr + n) >> plan->page_shift;
	i = segment_at(l->c, paddr);
	s += i;
	if (i == plan->n_segments || s->paddr > paddr || n > s->size - (paddr - s->paddr) || s->how == PHYSMEM_ABSENT ||
	    gate_run(&l->c->gate, first, end, &refuser) < end || refuser >= 0)
		return false;
	map = map_at(l, *at, n, fixed, s->fd, s->offset + (paddr - s->paddr));
	l->ended = false;
	if (map == MAP_FAILED)
		return false;
	count(&l->c->tally->pages_shown, end - first);
	*at = map;
	return true;
}

static void remember_locked(const void *at, uint64_t n, uint64_t offset)
{
	pthread_mutex_lock(&mapped_lock);
	remember((uintptr_t)at, (uintptr_t)at + n, offset);
	pthread_mutex_unlock(&mapped_lock);
}

int64_t compose(struct composer *c, void **at, uint64_t offset, uint64_t n, int fixed, unsigned pieces,
		enum compose_how how)
{
	struct laying l = { .c = c, .how = how, .pieces = pieces };
	uint64_t laid = n;
	void *base;
	int err;

	if (!c->gate.rules)
		return -EBADF;	/* without compose_ready() nothing is refused */
	if (fixed & MAP_FIXED)
		compose_forget(*at, n);
	if (lay_whole(&l, at, offset, n, fixed)) {
		remember_locked(*at, n, offset);
		return (int64_t)n;
	}
	base = c->libc->mmap(*at, n, PROT_READ, ZERO_FLAGS | fixed, -1, 0);
	if (base == MAP_FAILED)
		return -errno;
	l.at = base;
	err = lay(&l, offset, &laid);
	if (!err && laid < n && how == COMPOSE_ALL)
		err = -ENOMEM;
	if (err)
		laid = 0;
	if (laid < n)
		c->libc->munmap((uint8_t *)base + laid, n - laid);
	if (err)
		return err;
	remember_locked(base, laid, offset);
	*at = base;
	return (int64_t)laid;
}

static int map_shared(const struct composer *c, int fd, uint64_t n, int prot, void **map)
{
	*map = c->libc->mmap(NULL, n, prot, MAP_SHARED, fd, 0);
	return *map == MAP_FAILED ? -errno : 0;
}

static int open_plan(struct composer *c, int fd)
{
	struct stat st;
	void *map;
	int err;

	if (fstat(fd, &st))
		return -errno;
	if (st.st_size < (off_t)sizeof(struct plan))
		return -EBADMSG;
	err = map_shared(c, fd, (uint64_t)st.st_size, PROT_READ, &map);
	if (err)
		return err;
	c->plan = map;
	return c->plan->layout == sizeof(*c->plan) && c->plan->plan_size == (uint64_t)st.st_size ? 0 : -EBADMSG;
}

int compose_open(struct composer *c, const struct libc *libc, const char *path, char *why, size_t room)
{
	void *map = NULL;
	int fd, err;

	*c = (struct composer){ .libc = libc };
	fd = libc->open(path, O_RDONLY | O_CLOEXEC);
	err = fd < 0 ? -errno : open_plan(c, fd);
	if (fd >= 0)
		libc->close(fd);
	if (!err) {
		fd = compose_reopen(c, c->plan->tally_fd, O_RDWR);
		err = fd < 0 ? fd : map_shared(c, fd, sizeof(*c->tally), PROT_READ | PROT_WRITE, &map);
		if (fd >= 0)
			libc->close(fd);
	}
	if (err) {
		snprintf(why, room, "%s: %s", path, err == -EBADMSG ? "not what this library was built for" : strerror(-err));
		return err;
	}
	c->tally = map;
	count(&c->tally->loaded, 1);
	return 0;
}

int compose_ready(struct composer *c, char *why, size_t room)
{
	struct gate_rule *rules;
	struct guardfile file;
	int err = guardfile_check(&file, part(c, c->plan->guard), c->plan->guard_size, why, room);

	if (err)
		return err;
	rules = calloc(file.n + 1, sizeof(*rules));	/* no rules are no lack of memory */
	err = rules ? catch_sigbus(c) : -ENOMEM;
	if (err) {
		free(rules);
		snprintf(why, room, "%s", strerror(-err));
		return err;
	}
	for (size_t i = 0; i < file.n; i++)
		guardfile_rule(&file, i, rules + i, NULL, NULL);
	c->gate = (struct gate){ file.n, rules };
	return 0;
}
