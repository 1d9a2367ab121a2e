/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* dd through the guard: dd GUARD IMAGE PADDR SIZE >OUT. The image shows physical memory from address 0 on. */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <oldmem_guard.h>

enum { BLOCK = 1 << 20 };

static char block[BLOCK];

int main(int argc, char **argv)
{
	oldmem_guard_counters counted;
	oldmem_guard *guard;
	uint64_t paddr, left, refused;
	const char *name, *reason;
	struct stat image;
	size_t rules;
	int fd;

	if (argc != 5)
		errx(2, "usage: dd GUARD IMAGE PADDR SIZE");
	paddr = strtoull(argv[3], NULL, 0);
	left = strtoull(argv[4], NULL, 0);
	fd = open(argv[2], O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &image))
		err(1, "%s", argv[2]);
	if (oldmem_guard_new(&guard) || oldmem_guard_open(guard, argv[1]) ||
	    oldmem_guard_add_segment(guard, fd, 0, 0, (uint64_t)image.st_size, OLDMEM_GUARD_PREAD))
		errx(1, "%s", oldmem_guard_error(guard));
	close(fd);

	while (left) {
		size_t piece = left < BLOCK ? (size_t)left : BLOCK;

		oldmem_guard_read(guard, paddr, block, piece);
		if (fwrite(block, 1, piece, stdout) != piece)
			err(1, "standard output");
		paddr += piece;
		left -= piece;
	}
	if (fflush(stdout))
		err(1, "standard output");

	oldmem_guard_rules(guard, &rules);
	for (int i = 0; i < (int)rules; i++) {
		oldmem_guard_rule(guard, i, &name, &reason, &refused);
		if (refused)
			fprintf(stderr, "%s: %llu pages refused: %s\n", name, (unsigned long long)refused, reason);
	}
	oldmem_guard_get_counters(guard, &counted, sizeof(counted));
	fprintf(stderr, "%llu bytes read, %llu refused, %llu pages failed\n", (unsigned long long)counted.bytes_read,
		(unsigned long long)counted.bytes_refused, (unsigned long long)counted.pages_failed);
	oldmem_guard_close(guard);
	return 0;
}
