/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What this process has mapped at an address, by the kernel's own books. Async-signal-safe. */
#ifndef OLDMEM_VMA_H
#define OLDMEM_VMA_H

#include <stdbool.h>
#include <stdint.h>

struct vma {
	uintptr_t start, end;
	uint64_t offset;	/* of start in its file */
	uint64_t dev, ino;	/* of that file, major << 32 | minor; 0 where there is none */
	bool read_only;		/* no more and no less */
};

/* The mapping that holds the address. False if nothing is mapped there, or /proc cannot tell. */
bool vma_at(uintptr_t address, struct vma *found);

/* The two ways to ask, which vma_at() chooses from: PROCMAP_QUERY of Linux 6.11, and the text that always was there. */
int vma_query(int maps, uintptr_t address, struct vma *found);
bool vma_search(int maps, uintptr_t address, struct vma *found);

#endif
