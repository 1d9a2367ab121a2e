/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * XXH64 with seed 0 (doc/xxhash_spec.md of the xxHash project) of whole stripes of 32 bytes, piece by piece: four
 * lanes, as fast as memory, the same on machines of either byte order. It finds accidents, not forgers.
 */
#ifndef OLDMEM_SUM64_H
#define OLDMEM_SUM64_H

#include <stdint.h>

struct sum64 {
	uint64_t lane[4], size;
};

void sum64_begin(struct sum64 *s);

/* The next `size` bytes, a multiple of 32. */
void sum64_add(struct sum64 *s, const uint64_t *words, uint64_t size);

uint64_t sum64_end(const struct sum64 *s);

#endif
