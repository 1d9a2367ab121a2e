/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "compose.h"

#include <errno.h>
#include <sys/mman.h>

#include "after.h"

/* One call of compose(), under way. */
struct laying {
	const struct composer *c;
	const struct gate *gate;
	uint8_t *at;		/* of `offset` */
	uint64_t offset, end;	/* in the vmcore: what is still to be laid */
	unsigned pieces;	/* left */
	int err;		/* why it ended before the end */
};

static const struct view_extent *extents(const struct composer *c)
{
	return plan_part(c, c->plan->extents);
}

static const struct plan_segment *segments(const struct composer *c)
{
	return plan_part(c, c->plan->segments);
}

/* The segment that holds paddr, NULL if none does. */
static const struct plan_segment *segment_at(const struct composer *c, uint64_t paddr)
{
	const struct plan_segment *s = segments(c);
	size_t low = 0, high = c->plan->n_segments;

	while (low < high) {
		size_t mid = low + (high - low) / 2;

		if (s[mid].paddr > paddr)
			high = mid;
		else if (paddr - s[mid].paddr >= s[mid].size)
			low = mid + 1;
		else
			return s + mid;
	}
	return NULL;
}

/* What is refused, or a gap, is there already: zero pages. */
static void leave_zeros(struct laying *l, uint64_t n)
{
	l->at += n;
	l->offset += n;
}

static bool lay_file(struct laying *l, uint64_t file, uint64_t offset, uint64_t n)
{
	if (!l->pieces)
		l->err = -ENOMEM;
	else if (composer_map(l->c, l->at, n, MAP_FIXED, file, offset, &l->err) != MAP_FAILED)
		l->pieces--;
	if (l->err)
		return false;
	leave_zeros(l, n);
	return true;
}

/* RAM that nothing refuses. */
static bool lay_ram(struct laying *l, uint64_t paddr, uint64_t n)
{
	while (n) {
		const struct plan_segment *s = segment_at(l->c, paddr);
		uint64_t inside = s ? paddr - s->paddr : 0, piece = n;

		if (!s) {
			l->err = -ENXIO;
			return false;
		}
		if (piece > s->size - inside)
			piece = s->size - inside;
		if (!lay_file(l, s->file, s->offset + inside, piece))
			return false;
		tally_add(&l->c->tally->pages_shown, piece >> l->c->plan->page_shift);
		paddr += piece;
		n -= piece;
	}
	return true;
}

/* [l->offset, end) of one extent. */
static bool lay_extent(struct laying *l, const struct view_extent *e, uint64_t end)
{
	const unsigned shift = (unsigned)l->c->plan->page_shift;

	if ((e->offset | e->size | e->paddr) & (plan_page(l->c) - 1)) {
		l->err = -EINVAL;	/* memory across pages of the file */
		return false;
	}
	while (l->offset < end) {
		uint64_t pfn = (e->paddr + (l->offset - e->offset)) >> shift, left = (end - l->offset) >> shift, run;
		int refuser;

		run = gate_run(l->gate, pfn, pfn + left, &refuser) - pfn;
		if (refuser >= 0) {
			tally_add(&l->c->tally->refused[refuser], run);
			leave_zeros(l, run << shift);
		} else if (!lay_ram(l, pfn << shift, run << shift)) {
			return false;
		}
	}
	return true;
}

/* All that is to be laid, over zero pages, until it is done or l->err. */
static void lay(struct laying *l)
{
	const struct plan *plan = l->c->plan;
	const uint64_t page = plan_page(l->c), head_end = (plan->head_size + page - 1) & ~(page - 1);
	const struct view_extent *e = extents(l->c), *last = e + plan->n_extents;

	if (l->offset < head_end &&
	    !lay_file(l, 0, plan->head + l->offset, (head_end < l->end ? head_end : l->end) - l->offset))
		return;
	for (e += extent_after(e, plan->n_extents, l->offset); l->offset < l->end; e++) {
		uint64_t start = e < last && e->offset < l->end ? e->offset : l->end;

		if (l->offset < start)
			leave_zeros(l, start - l->offset);
		if (l->offset < l->end && !lay_extent(l, e, e->offset + e->size < l->end ? e->offset + e->size : l->end))
			return;
	}
}

/*
 * The common case, all of [offset, offset + n) in one piece of one file, needs no zero pages below it. MAP_FAILED where
 * it is not that case, or did not work: then it is done piece by piece.
 */
static void *map_whole(const struct composer *c, const struct gate *gate, void *at, uint64_t offset, uint64_t n, int fixed)
{
	const unsigned shift = (unsigned)c->plan->page_shift;
	size_t i = extent_after(extents(c), c->plan->n_extents, offset);
	const struct view_extent *e = extents(c) + i;
	const struct plan_segment *s;
	uint64_t paddr;
	int refuser, err;
	void *map;

	if (i == c->plan->n_extents || offset < e->offset || n > e->size - (offset - e->offset) ||
	    (e->offset | e->paddr) & (plan_page(c) - 1))
		return MAP_FAILED;
	paddr = e->paddr + (offset - e->offset);
	s = segment_at(c, paddr);
	if (!s || n > s->size - (paddr - s->paddr) ||
	    gate_run(gate, paddr >> shift, (paddr + n) >> shift, &refuser) < (paddr + n) >> shift || refuser >= 0)
		return MAP_FAILED;
	map = composer_map(c, at, n, fixed, s->file, s->offset + (paddr - s->paddr), &err);
	if (map != MAP_FAILED)
		tally_add(&c->tally->pages_shown, n >> shift);
	return map;
}

int64_t compose(const struct composer *c, void **at, uint64_t offset, uint64_t n, int fixed, unsigned pieces,
		enum compose_how how)
{
	const struct gate *gate = __atomic_load_n(&c->gate, __ATOMIC_ACQUIRE);
	struct laying l = { .c = c, .gate = gate, .offset = offset, .end = offset + n, .pieces = pieces };
	void *base = map_whole(c, gate, *at, offset, n, fixed);
	uint64_t laid;

	if (base != MAP_FAILED) {
		*at = base;
		return (int64_t)n;
	}
	base = c->mmap(*at, n, PROT_READ, COMPOSER_EMPTY | fixed, -1, 0);
	if (base == MAP_FAILED)
		return -errno;
	l.at = base;
	lay(&l);
	laid = how == COMPOSE_ALL && l.err ? 0 : l.offset - offset;
	if (laid < n)
		composer_unmap(c, (uint8_t *)base + laid, n - laid, fixed);
	if (!laid)
		return l.err;
	*at = base;
	return (int64_t)laid;
}
