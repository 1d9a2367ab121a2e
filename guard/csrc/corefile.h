/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reads of the kernel's own /proc/vmcore that neither keep it open nor trust its offsets to stay.
 *
 * A driver may add a device dump to it at any time (fs/proc/vmcore.c:vmcore_add_device_dump()). Since Linux 6.14 that
 * fails while the file is open; before, it shifts all memory in the file by the dump's size, under whoever has it open.
 * So the file is opened for a batch of reads, its offsets are looked up anew each time, and after each read it is made
 * sure that they still hold.
 */
#ifndef OLDMEM_COREFILE_H
#define OLDMEM_COREFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { COREFILE_MARK = 256 };

/* The file as it was when its header was read; what is open of it now. Values are of the machine's byte order. */
struct corefile {
	int path_fd;				/* O_PATH: leads to the file whatever is mounted over its name */
	int fd;					/* -1 while it is closed */
	uint64_t load_at;			/* where the program header of the last PT_LOAD is */
	uint64_t load_offset, load_paddr;	/* its p_offset and p_paddr */
	uint64_t end;				/* of the memory in the file */
	uint64_t mark_at;			/* where the last mark_size bytes of the notes are */
	uint32_t mark_size;
	uint8_t mark[COREFILE_MARK];
	bool settled;				/* `shift` has been looked up since the file was opened */
	bool given_up;				/* that failed the last time: not worth waiting for again */
	uint64_t shift;				/* to be added to an offset of that time */
};

/* Open it if it is closed, and look up `shift`. 0 or -errno; ESTALE where it cannot be made out. */
int corefile_settle(struct corefile *c);

/* Does memory still lie where it lay when `shift` was looked up? */
bool corefile_in_place(const struct corefile *c);

/* n bytes from the offset on, as offsets were when the header was read. 0 or -errno, then the buffer is undefined. */
int corefile_read(struct corefile *c, uint64_t offset, void *to, size_t n);

/* Close it: drivers may add their dumps. */
void corefile_rest(struct corefile *c);

#endif
