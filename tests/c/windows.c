/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What "oldmem run" does inside of a collector, without being preloaded: windows PLAN EXPECTED. Threads read and map the
 * vmcore of the plan at random places; each answer must have the bytes of the file EXPECTED.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "window.h"

enum { THREADS = 6, ROUNDS = 400, PAGE = 4096 };

static const struct libc libc = { open, close, mmap, munmap, fstat };
static struct composer composer;
static const uint8_t *expected;
static uint64_t size;

static void read_somewhere(unsigned *seed)
{
	uint64_t offset = (uint64_t)rand_r(seed) % (size + PAGE), n = (uint64_t)rand_r(seed) % (5 * PAGE);
	uint64_t most = offset < size ? size - offset : 0;
	uint8_t buffer[5 * PAGE];
	int64_t done = window_read(&composer, offset, buffer, n);

	if (done != (int64_t)(n < most ? n : most))
		errx(1, "read of %#lx at %#lx gave %ld", n, offset, done);
	if (done && memcmp(buffer, expected + offset, (size_t)done))
		errx(1, "wrong bytes at %lu+%lu", offset, n);
}

static void map_somewhere(unsigned *seed)
{
	uint64_t offset = (uint64_t)rand_r(seed) % (size / PAGE) * PAGE, n = (1 + (uint64_t)rand_r(seed) % 8) * PAGE;
	void *map = NULL;
	int64_t laid;

	if (n > size - offset)
		n = size - offset;
	laid = compose(&composer, &map, offset, n, 0, 64, COMPOSE_ALL);
	if (laid != (int64_t)n)
		errx(1, "mapping %lu at %lu gave %ld", n, offset, laid);
	if (memcmp(map, expected + offset, n))
		errx(1, "wrong bytes mapped at %lu+%lu", offset, n);
	/* a part of it, then the rest, as some programs do */
	compose_forget(map, PAGE);
	munmap(map, PAGE);
	compose_forget((uint8_t *)map + PAGE, n - PAGE);
	if (n > PAGE)
		munmap((uint8_t *)map + PAGE, n - PAGE);
}

static void *work(void *number)
{
	unsigned seed = (unsigned)(uintptr_t)number;

	for (int i = 0; i < ROUNDS; i++) {
		read_somewhere(&seed);
		map_somewhere(&seed);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	struct stat st;
	char why[256];
	void *map = NULL;
	int fd;

	if (argc != 3)
		errx(2, "usage: windows PLAN EXPECTED");
	if (compose_open(&composer, &libc, argv[1], why, sizeof(why)) || compose_ready(&composer, why, sizeof(why)))
		errx(1, "%s", why);
	fd = open(argv[2], O_RDONLY);
	if (fd < 0 || fstat(fd, &st))
		err(1, "%s", argv[2]);
	size = (uint64_t)st.st_size;
	expected = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (expected == MAP_FAILED || size != composer.plan->size)
		errx(1, "%s is not as large as the plan says", argv[2]);
	if (compose(&composer, &map, 0, size, 0, 2, COMPOSE_ALL) != -ENOMEM)
		errx(1, "more pieces than allowed");
	for (uintptr_t i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, work, (void *)(i + 1)))
			errx(1, "no thread");
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	return 0;
}
