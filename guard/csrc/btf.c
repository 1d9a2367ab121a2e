/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "btf.h"

#include <string.h>

enum { HEAD = 12 };		/* struct btf_type: u32 name_off, info, and size or type */

enum {				/* enum of BTF_KIND_* */
	INT = 1, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC,
	FLOAT, DECL_TAG, TYPE_TAG, ENUM64, KINDS
};

/* What follows the head of each kind, in bytes: once, and for each of the vlen members */
static const uint8_t once[KINDS] = { [INT] = 4, [ARRAY] = 12, [VAR] = 4, [DECL_TAG] = 4 };
static const uint8_t each[KINDS] = {
	[STRUCT] = 12, [UNION] = 12, [ENUM] = 8, [FUNC_PROTO] = 8, [DATASEC] = 12, [ENUM64] = 12
};

static bool is_named(const struct btf_walk *w, uint32_t name)
{
	for (uint32_t i = 0; i < w->n_names; i++)
		if (w->names[i] == name)
			return true;
	return false;
}

bool btf_walk(struct btf_walk *w, const void *data, size_t size)
{
	const uint8_t *p = data;
	uint64_t start = w->at;

	while (w->at - start < size && size - (w->at - start) >= HEAD) {
		uint32_t head[2], kind, vlen;

		memcpy(head, p + (w->at - start), sizeof(head));
		kind = head[1] >> 24 & 0x1f;
		vlen = head[1] & 0xffff;
		if (!kind || kind >= KINDS)
			return false;
		if ((w->id - 1) % w->stride == 0 && w->n_index < w->max_index)
			w->index[w->n_index++] = (uint32_t)w->at;
		if ((kind == STRUCT || kind == UNION || kind == ENUM || kind == TYPEDEF || kind == ENUM64) &&
		    w->n_hits < w->max_hits && is_named(w, head[0])) {
			w->hits[w->n_hits].id = w->id;
			w->hits[w->n_hits++].at = (uint32_t)w->at;
		}
		w->at += HEAD + once[kind] + (uint64_t)each[kind] * vlen;
		w->id++;
	}
	return true;
}

size_t btf_strings(const void *data, size_t size, uint32_t base, const char *names, size_t n, uint32_t *offsets)
{
	bool first[256] = { false };
	const char *s = data, *name = names;
	size_t at = 0;

	for (size_t i = 0; i < n; i++, name += strlen(name) + 1)
		first[(uint8_t)*name] = true;
	while (at < size) {
		const char *end = memchr(s + at, 0, size - at);

		if (!end)
			break;
		if (first[(uint8_t)s[at]]) {
			name = names;
			for (size_t i = 0; i < n; i++, name += strlen(name) + 1)
				if (!strcmp(name, s + at))
					offsets[i] = base + (uint32_t)at;
		}
		at = (size_t)(end - s) + 1;
	}
	return at;
}
