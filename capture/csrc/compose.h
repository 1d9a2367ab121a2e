/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A vmcore mapped into this process as mmap_vmcore() (fs/proc/vmcore.c) maps it: RAM from the files that show it, the
 * zero page for refused pages and gaps, the header from memory. What cannot be had that way is left to the file that has
 * the vmcore for every program, whose server reads what can be read, and tells what cannot.
 */
#ifndef OLDMEM_COMPOSE_H
#define OLDMEM_COMPOSE_H

#include "composer.h"

enum compose_how {
	COMPOSE_ALL,	/* all of it or -errno */
	COMPOSE_SOME	/* as much from the start as there can be, at least a page */
};

/*
 * Map n bytes of the vmcore from `offset` on (whole pages, not beyond the vmcore's last one) at *at, or anywhere where
 * that is NULL. `fixed` is what mmap(2) has for "there and nowhere else": 0, MAP_FIXED or MAP_FIXED_NOREPLACE. At most
 * `pieces` mappings are made. Returns the bytes mapped, or -errno with nothing mapped; of MAP_FIXED, nothing any more, and
 * the place is kept (composer_unmap()).
 * To be called only when composer_ready() has said so. Async-signal-safe.
 */
int64_t compose(const struct composer *c, void **at, uint64_t offset, uint64_t n, int fixed, unsigned pieces,
		enum compose_how how);

#endif
