/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "window.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

/*
 * 128 KiB of page tables each. Where memory is in many pieces a window ends after PIECES of them: all windows together
 * stay far below vm.max_map_count (65530).
 */
enum { WINDOWS = 16, WINDOW_SIZE = 64 << 20, PIECES = 1024 };

struct window {
	uint64_t start, end;	/* in the vmcore; nothing is mapped where end is 0 */
	const uint8_t *map;
	unsigned readers;
	uint64_t used;		/* clock of the last use */
};

static struct window windows[WINDOWS];
static uint64_t clock_now;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t left = PTHREAD_COND_INITIALIZER;

static void unmap(struct composer *c, const uint8_t *map, uint64_t n)
{
	compose_forget(map, n);
	c->libc->munmap((void *)map, n);
}

static bool drop_idle(struct composer *c)
{
	bool dropped = false;

	for (struct window *w = windows; w < windows + WINDOWS; w++) {
		if (!w->end || w->readers)
			continue;
		unmap(c, w->map, w->end - w->start);
		w->end = 0;
		dropped = true;
	}
	return dropped;
}

/* Map a window that holds the offset, from `start` on if its pieces last, else from the offset on. 0 or -errno. */
static int fill(struct composer *c, struct window *w, uint64_t start, uint64_t offset)
{
	const uint64_t page = UINT64_C(1) << c->plan->page_shift, size = (c->plan->size + page - 1) & ~(page - 1);
	const uint64_t slot_end = offset / WINDOW_SIZE * WINDOW_SIZE + WINDOW_SIZE, end = slot_end < size ? slot_end : size;

	for (;; start = offset & ~(page - 1)) {
		void *map = NULL;
		int64_t laid = compose(c, &map, start, end - start, 0, PIECES, COMPOSE_SOME);

		/* the collector has many mappings of its own */
		if (laid == -ENOMEM && drop_idle(c))
			continue;
		if (laid <= 0)
			return laid ? (int)laid : -EIO;
		if (start + (uint64_t)laid > offset) {
			*w = (struct window){ .start = start, .end = start + (uint64_t)laid, .map = map };
			return 0;
		}
		unmap(c, map, (uint64_t)laid);
	}
}

/* The window around the offset with one more reader, or NULL with *err. */
static struct window *enter(struct composer *c, uint64_t offset, int *err)
{
	uint64_t start = offset / WINDOW_SIZE * WINDOW_SIZE;
	struct window *oldest;

	pthread_mutex_lock(&lock);
	for (;;) {
		oldest = NULL;
		for (struct window *w = windows; w < windows + WINDOWS; w++) {
			if (w->end && offset >= w->start && offset < w->end) {
				oldest = w;
				goto found;
			}
			/* the pieces of the window there ended before the offset: the next one begins at the offset */
			if (w->end && w->start <= offset && w->start / WINDOW_SIZE == offset / WINDOW_SIZE)
				start = offset & -(UINT64_C(1) << c->plan->page_shift);
			if (!w->readers && (!oldest || w->used < oldest->used))
				oldest = w;
		}
		if (oldest)
			break;
		pthread_cond_wait(&left, &lock);
	}
	if (oldest->end)
		unmap(c, oldest->map, oldest->end - oldest->start);
	oldest->end = 0;
	*err = fill(c, oldest, start, offset);
	if (*err) {
		pthread_mutex_unlock(&lock);
		return NULL;
	}
found:
	oldest->readers++;
	oldest->used = ++clock_now;
	pthread_mutex_unlock(&lock);
	return oldest;
}

static void leave(struct window *w)
{
	pthread_mutex_lock(&lock);
	if (!--w->readers)
		pthread_cond_signal(&left);
	pthread_mutex_unlock(&lock);
}

int64_t window_read(struct composer *c, uint64_t offset, void *buf, uint64_t n)
{
	uint64_t done = 0;

	if (offset >= c->plan->size)
		return 0;
	if (n > c->plan->size - offset)
		n = c->plan->size - offset;
	while (done < n) {
		uint64_t piece = n - done, at = offset + done;
		int err = 0;
		struct window *w = enter(c, at, &err);

		if (!w)
			return done ? (int64_t)done : err;
		if (piece > w->end - at)
			piece = w->end - at;
		memcpy((uint8_t *)buf + done, w->map + (at - w->start), piece);
		leave(w);
		done += piece;
	}
	return (int64_t)n;
}
