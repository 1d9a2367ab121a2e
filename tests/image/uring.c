/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * FILE OFFSET SIZE: one read by io_uring(7), without liburing; what it gave goes to standard output. Status 77 where the
 * kernel has none.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *map(int ring, size_t size, off_t what)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, what);

	if (at == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	return at;
}

int main(int argc, char **argv)
{
	struct io_uring_params p = { 0 };
	int ring = (int)syscall(SYS_io_uring_setup, 1, &p), fd = argc == 4 ? open(argv[1], O_RDONLY) : -1;
	uint8_t *submissions, *completions, *buffer;
	struct io_uring_sqe *entry;
	const struct io_uring_cqe *result;
	size_t size;

	if (fd < 0) {
		fprintf(stderr, "FILE OFFSET SIZE\n");
		return 2;
	}
	if (ring < 0)
		return 77;
	size = strtoul(argv[3], NULL, 0);
	buffer = calloc(1, size);
	submissions = map(ring, p.sq_off.array + p.sq_entries * sizeof(uint32_t), IORING_OFF_SQ_RING);
	completions = map(ring, p.cq_off.cqes + p.cq_entries * sizeof(*result), IORING_OFF_CQ_RING);
	entry = map(ring, sizeof(*entry), IORING_OFF_SQES);
	*entry = (struct io_uring_sqe){
		.opcode = IORING_OP_READ, .fd = fd, .addr = (uintptr_t)buffer, .len = (uint32_t)size,
		.off = strtoull(argv[2], NULL, 0),
	};
	*(uint32_t *)(submissions + p.sq_off.array) = 0;
	__atomic_store_n((uint32_t *)(submissions + p.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (!buffer || syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1) {
		perror("io_uring_enter");
		return 1;
	}
	result = (const void *)(completions + p.cq_off.cqes);
	if (result->res < 0) {
		errno = -result->res;
		perror("read");
		return 1;
	}
	return fwrite(buffer, 1, (size_t)result->res, stdout) != (size_t)result->res;
}
