/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "service.h"

#include <errno.h>
#include <poll.h>
#include <sys/mman.h>

int service_watch(const int *watch, size_t n, int timeout)
{
	struct pollfd wanted[FUSE_WATCHED];
	int ready = 0;

	if (n > FUSE_WATCHED)
		return -EINVAL;
	for (size_t i = 0; i < n; i++)
		wanted[i] = (struct pollfd){ .fd = watch[i], .events = POLLIN };
	if (poll(wanted, n, timeout) < 0)
		return -errno;
	for (size_t i = 0; i < n; i++)
		ready |= wanted[i].revents ? 1 << i : 0;
	return ready;
}

/* Linux 6.1; works where transparent huge pages are off, as they are below 512 MiB of RAM */
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

void *service_buffer(size_t size)
{
	/* in twice as much there is an aligned place; it stays, as the buffer does, until the process ends */
	uint8_t *room = mmap(NULL, 2 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	void *map;

	if (room == MAP_FAILED)
		return NULL;
	map = mmap(room + (-(uintptr_t)room & (size - 1)), size, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (map == MAP_FAILED)
		return NULL;
	*(volatile uint8_t *)map = 0;	/* what nothing is mapped in cannot be collapsed */
	madvise(map, size, MADV_COLLAPSE);
	return map;
}

uint32_t service_leave(struct fuse_shared *shared, uint32_t bits)
{
	return __atomic_fetch_or(&shared->leaving, bits, __ATOMIC_SEQ_CST);
}

uint32_t service_arrive(struct fuse_shared *shared, uint32_t bits)
{
	return __atomic_fetch_and(&shared->leaving, ~bits, __ATOMIC_SEQ_CST);
}

int service_lock_memory(void)
{
	return mlockall(MCL_CURRENT | MCL_ONFAULT) ? -errno : 0;
}
