/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Two passes over the BTF of a dead kernel (include/uapi/linux/btf.h), which has some 100000 types and strings: where
 * the types of given names stand. Piece by piece, so that the whole of it need never be in memory. The bytes are
 * untrusted, in the byte order of the machine that this runs on.
 */
#ifndef OLDMEM_BTF_H
#define OLDMEM_BTF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct btf_hit {
	uint32_t id;		/* type id; ids count from 1 in the order of the records */
	uint32_t at;		/* offset of its record in the type section */
};

struct btf_walk {
	uint64_t at;		/* offset in the type section of the record that comes next, and its type id */
	uint32_t id;
	uint32_t stride;	/* index[i] is the offset of the record of type id 1 + i * stride */
	uint32_t *index;
	uint32_t n_index, max_index;
	const uint32_t *names;	/* offsets in the string section */
	uint32_t n_names;
	struct btf_hit *hits;	/* structs, unions, enums and typedefs with one of the names */
	uint32_t n_hits, max_hits;
};

/*
 * Look at the records that begin in the `size` bytes at offset w->at of the type section; false at a kind of type that
 * is not known, for then it is not known either how long the record is. A record may reach beyond: w->at is where to go
 * on. Fewer than 12 bytes hold no record.
 */
bool btf_walk(struct btf_walk *w, const void *data, size_t size);

/*
 * Among the `size` bytes at offset `base` of the string section, at the start of a string: where the `n` strings stand
 * that lie one behind the other in `names`. offsets[i] stays as it is for those that are not there. Returns how many
 * bytes hold whole strings.
 */
size_t btf_strings(const void *data, size_t size, uint32_t base, const char *names, size_t n, uint32_t *offsets);

#endif
