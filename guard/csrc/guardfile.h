/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A compiled guard file: the rules of a registry in the shape in which the gate asks them, so that a mapping of the
 * file is all that it takes. The format, byte by byte, is in docs/design.md, "A compiled guard".
 *
 * Everything in the file is checked once, before anything of it is used; there is no file that makes the gate read
 * outside of the mapping, or not end. That holds as long as the file is not changed in place: whoever writes a guard
 * writes another file and renames it.
 */
#ifndef OLDMEM_GUARDFILE_H
#define OLDMEM_GUARDFILE_H

#include "gate.h"

enum {
	GUARDFILE_VERSION = 1,
	GUARDFILE_MAX_RULES = 4096,	/* they are asked one after the other */
	GUARDFILE_ALIGN = 64,		/* bytes; rules, texts and each array begin at a multiple */
};

/* A checked file. It points into `map` and owns it only if guardfile_open() made it. */
struct guardfile {
	const void *map;
	uint64_t size;
	uint32_t page_shift;
	size_t n;	/* rules */
};

/*
 * Check the file that lies at `map`, 8-byte aligned. 0, or -EBADMSG (no guard file, or damaged) or -EPROTONOSUPPORT (of
 * another version or byte order), with one line that says what is wrong in `why`.
 */
int guardfile_check(struct guardfile *f, const void *map, uint64_t size, char *why, size_t room);

/* Map and check the file. As guardfile_check(), or another -errno where the file cannot be had. */
int guardfile_open(struct guardfile *f, const char *path, char *why, size_t room);

void guardfile_close(struct guardfile *f);

/*
 * Rule i < n, whose arrays are the file's own, its name and its reason, which end with a NUL and have no other control
 * characters of ASCII. Results that are not wanted may be NULL.
 */
void guardfile_rule(const struct guardfile *f, size_t i, struct gate_rule *rule, const char **name,
		    const char **reason);

/* The checksum of a file's first n bytes, a multiple of 64. */
uint64_t guardfile_sum(const void *bytes, uint64_t n);

#endif
