/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "window.h"

#include <string.h>

#include "sys.h"

/*
 * 128 KiB of page tables each. Where memory is in many pieces a window ends after PIECES of them: all windows together
 * stay far below vm.max_map_count (65530).
 */
enum { WINDOWS = 16, WINDOW_SIZE = 64 << 20, PIECES = 1024 };

/* `users` of a window that is being mapped; whoever is not among the users must not look at more than a hint. */
enum { MAPPING = 1 << 30 };

/*
 * A thread that was reading when another one forked reads no more in the child: its window stays as it is there for
 * ever, which costs the child a window of these, and nothing else.
 */
struct window {
	unsigned users;
	uint64_t start, end;	/* in the vmcore; nothing is mapped where end is 0 */
	const uint8_t *map;
	uint64_t used;		/* clock of the last use */
};

static struct window windows[WINDOWS];
static uint64_t clock_now;

static uint64_t hint(const uint64_t *of)
{
	return __atomic_load_n(of, __ATOMIC_RELAXED);
}

static void set(uint64_t *of, uint64_t value)
{
	__atomic_store_n(of, value, __ATOMIC_RELAXED);
}

static bool holds(const struct window *w, uint64_t offset)
{
	return hint(&w->start) <= offset && offset < hint(&w->end);
}

static void leave(struct window *w)
{
	__atomic_fetch_sub(&w->users, 1, __ATOMIC_RELEASE);
}

/* One user more, if it holds the offset. */
static bool enter(struct window *w, uint64_t offset)
{
	unsigned users = __atomic_load_n(&w->users, __ATOMIC_RELAXED);

	do
		if (users >= MAPPING || !holds(w, offset))
			return false;
	while (!__atomic_compare_exchange_n(&w->users, &users, users + 1, true, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
	if (holds(w, offset))
		return true;
	leave(w);
	return false;
}

/* The window that was not used for longest, to be mapped anew by nobody else; NULL if all are in use. */
static struct window *take(void)
{
	for (;;) {
		struct window *oldest = NULL;
		unsigned none = 0;

		for (struct window *w = windows; w < windows + WINDOWS; w++)
			if (!__atomic_load_n(&w->users, __ATOMIC_RELAXED) && (!oldest || hint(&w->used) < hint(&oldest->used)))
				oldest = w;
		if (!oldest)
			return NULL;
		if (__atomic_compare_exchange_n(&oldest->users, &none, MAPPING, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
			return oldest;
	}
}

/* Map a window that holds the offset: from `start` on if its pieces last, else from the offset on. */
static bool map(const struct composer *c, struct window *w, uint64_t start, uint64_t offset)
{
	const uint64_t page = plan_page(c), size = (c->plan->size + page - 1) & ~(page - 1);
	const uint64_t slot_end = offset / WINDOW_SIZE * WINDOW_SIZE + WINDOW_SIZE, end = slot_end < size ? slot_end : size;

	if (w->end)
		sys_munmap(w->map, w->end - w->start);
	set(&w->end, 0);
	for (;;) {
		void *at = NULL;
		int64_t laid = compose(c, &at, start, end - start, 0, PIECES, COMPOSE_SOME);

		if (laid > 0 && start + (uint64_t)laid > offset) {
			w->map = at;
			set(&w->start, start);
			set(&w->end, start + (uint64_t)laid);
			return true;
		}
		if (laid > 0)
			sys_munmap(at, (size_t)laid);
		if (start == (offset & ~(page - 1)))
			return false;
		start = offset & ~(page - 1);
	}
}

/* The window around the offset with one more user, or NULL. */
static struct window *window_at(const struct composer *c, uint64_t offset)
{
	uint64_t start = offset / WINDOW_SIZE * WINDOW_SIZE;
	struct window *w;
	bool mapped;

	for (w = windows; w < windows + WINDOWS; w++) {
		if (enter(w, offset))
			return w;
		/* the pieces of the window there ended before the offset: the next one begins at the offset */
		if (hint(&w->end) && hint(&w->start) <= offset && hint(&w->start) / WINDOW_SIZE == offset / WINDOW_SIZE)
			start = offset & -plan_page(c);
	}
	w = take();
	if (!w)
		return NULL;
	mapped = map(c, w, start, offset);
	__atomic_store_n(&w->users, mapped, __ATOMIC_RELEASE);
	return mapped ? w : NULL;
}

uint64_t window_read(const struct composer *c, uint64_t offset, void *buf, uint64_t n)
{
	uint64_t done = 0;

	if (offset >= c->plan->size)
		return 0;
	if (n > c->plan->size - offset)
		n = c->plan->size - offset;
	while (done < n) {
		uint64_t piece = n - done, at = offset + done;
		struct window *w = window_at(c, at);

		if (!w)
			break;
		set(&w->used, __atomic_add_fetch(&clock_now, 1, __ATOMIC_RELAXED));
		if (piece > hint(&w->end) - at)
			piece = hint(&w->end) - at;
		memcpy((uint8_t *)buf + done, w->map + (at - hint(&w->start)), piece);
		leave(w);
		done += piece;
	}
	return done;
}
