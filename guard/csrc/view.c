/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "view.h"

#include "after.h"

#include <string.h>

size_t view_read(const struct view *v, uint64_t offset, void *buf, size_t n)
{
	uint8_t *to = buf;
	size_t left, i;

	if (offset >= v->size)
		return 0;
	if (n > v->size - offset)
		n = (size_t)(v->size - offset);
	left = n;
	if (offset < v->head_size) {
		size_t piece = v->head_size - offset < left ? (size_t)(v->head_size - offset) : left;

		memcpy(to, v->head + offset, piece);
		to += piece;
		offset += piece;
		left -= piece;
	}
	for (i = extent_after(v->extents, v->n, offset); left; i++) {
		uint64_t start = i < v->n ? v->extents[i].offset : v->size;
		size_t piece;

		if (offset < start) {
			piece = start - offset < left ? (size_t)(start - offset) : left;
			memset(to, 0, piece);
			to += piece;
			offset += piece;
			left -= piece;
		}
		if (!left || i >= v->n)
			break;
		piece = start + v->extents[i].size - offset < left ? (size_t)(start + v->extents[i].size - offset) : left;
		physmem_read(v->mem, v->extents[i].paddr + (offset - start), to, piece);
		to += piece;
		offset += piece;
		left -= piece;
	}
	return n;
}

bool all_zero(const void *buf, size_t n)
{
	const uint8_t *p = buf;

	/* the first byte is zero and every byte equals its successor */
	return !n || (!p[0] && !memcmp(p, p + 1, n - 1));
}
