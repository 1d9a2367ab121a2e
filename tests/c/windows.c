/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What "oldmem run" does inside of a collector, without being preloaded: windows PLAN EXPECTED IMAGE. Threads read and map
 * the vmcore of the plan at random places, while signals read too and children of a fork do; each answer must have the
 * bytes of the file EXPECTED. Then IMAGE is cut, and what it had is zeros, marked in the tally.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vma.h"
#include "window.h"

/* A child of a fork has none of its parent's threads. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
	return "report_thread_leaks=0";
}

enum { THREADS = 6, ROUNDS = 300, FORKS = 20, PAGE = 4096 };

static struct composer composer;
static const uint8_t *expected;
static uint64_t size;

static void compare(const void *got, uint64_t n, uint64_t offset, const char *how)
{
	if (memcmp(got, expected + offset, n))
		errx(1, "wrong bytes %s at %lu+%lu", how, offset, n);
}

/* Fewer bytes than were asked for are no error: the server has the rest. Most reads get all. */
static uint64_t read_somewhere(unsigned *seed)
{
	uint64_t offset = (uint64_t)rand_r(seed) % (size + PAGE), n = (uint64_t)rand_r(seed) % (5 * PAGE);
	uint64_t most = offset < size ? size - offset : 0, done;
	uint8_t buffer[5 * PAGE];

	done = window_read(&composer, offset, buffer, n);
	if (done > n || done > most)
		errx(1, "read of %#lx at %#lx gave %lu", n, offset, done);
	compare(buffer, done, offset < size ? offset : 0, "read");
	return done == (n < most ? n : most);
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
	compare(map, n, offset, "mapped");
	/* a part of it, then the rest, as some programs do */
	munmap(map, PAGE);
	if (n > PAGE)
		munmap((uint8_t *)map + PAGE, n - PAGE);
}

static void *work(void *number)
{
	unsigned seed = (unsigned)(uintptr_t)number;
	int whole = 0;

	for (int i = 0; i < ROUNDS; i++) {
		whole += read_somewhere(&seed) ? 1 : 0;
		map_somewhere(&seed);
	}
	if (!whole)
		errx(1, "no read was made by a window");
	return NULL;
}

static void on_signal(int number)
{
	static unsigned seed = 1;	/* the signal is blocked while it is handled, and sent to one thread */

	(void)number;
	read_somewhere(&seed);
}

static void work_with_signals_and_forks(void)
{
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	pthread_t threads[THREADS];

	sigaction(SIGUSR1, &action, NULL);
	for (uintptr_t i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, work, (void *)(i + 1)))
			errx(1, "no thread");
	for (unsigned i = 0; i < FORKS; i++) {
		pid_t child = fork();
		int status;

		if (!child) {
			alarm(120);
			for (int k = 0; k < 20; k++) {
				read_somewhere(&i);
				map_somewhere(&i);
			}
			_exit(0);
		}
		pthread_kill(threads[0], SIGUSR1);
		if (waitpid(child, &status, 0) != child || status)
			errx(1, "child %u ended with %#x", i, status);
	}
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
}

static uint64_t marked(void)
{
	const struct plan_segment *s = plan_part(&composer, composer.plan->segments);
	uint64_t pages = 0, sum = 0;

	for (uint64_t i = 0; i < composer.plan->n_segments; i++)
		pages += s[i].size / PAGE;
	for (uint64_t i = 0; i < (pages + 63) / 64; i++)
		sum += (uint64_t)__builtin_popcountll(composer.tally->failed[i]);
	return sum;
}

/* Of the vmcore's memory, the pages that nothing refuses. */
static uint64_t allowed(void)
{
	const struct view_extent *e = plan_part(&composer, composer.plan->extents);
	uint64_t sum = 0;

	for (uint64_t i = 0; i < composer.plan->n_extents; i++)
		for (uint64_t at = 0; at < e[i].size; at += PAGE)
			sum += gate_refuser(composer.gate, (e[i].paddr + at) / PAGE) < 0;
	return sum;
}

static void *touch(void *map)
{
	for (uint64_t at = 0; at < size; at += PAGE) {
		uint8_t byte = ((volatile uint8_t *)map)[at];

		if (byte && byte != expected[at])
			errx(1, "wrong byte at %lu", at);
	}
	return NULL;
}

static void cut(const char *image)
{
	pthread_t threads[2];
	struct vma asked, searched;
	void *map[2] = { NULL };
	uint64_t lost;
	int maps = open("/proc/self/maps", O_RDONLY);

	for (int i = 0; i < 2; i++)
		if (compose(&composer, &map[i], 0, size, 0, 64, COMPOSE_SOME) <= 0)
			errx(1, "not mapped");
	if (!vma_search(maps, (uintptr_t)map[0] + 5, &searched) || searched.start != (uintptr_t)map[0] || !searched.ino)
		errx(1, "the maps do not tell what is mapped");
	if (!vma_query(maps, (uintptr_t)map[0] + 5, &asked) &&
	    (asked.start != searched.start || asked.end != searched.end || asked.offset != searched.offset ||
	     asked.dev != searched.dev || asked.ino != searched.ino || asked.read_only != searched.read_only))
		errx(1, "the two ways to ask what is mapped give two answers");
	if (vma_at(8, &asked))
		errx(1, "something is mapped at 8");
	close(maps);
	if (truncate(image, 0))
		err(1, "%s", image);
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, touch, map[i]);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	lost = marked();
	if (lost != allowed())
		errx(1, "%lu pages marked as lost of %lu", lost, allowed());
	touch(map[0]);
	if (marked() != lost)
		errx(1, "pages were lost a second time");
}

/* Where MAP_FIXED did not succeed, no other thread's mapping may come to lie before the kernel is asked for the same. */
static void place_stays_taken(void)
{
	void *map = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct vma there;

	if (compose(&composer, &map, 0, size, MAP_FIXED, 2, COMPOSE_ALL) != -ENOMEM)
		errx(1, "more pieces than allowed");
	for (uint64_t at = 0; at < size; at += PAGE)
		if (!vma_at((uintptr_t)map + at, &there) || there.read_only)
			errx(1, "nothing is mapped at %lu, or what can be read", at);
	munmap(map, size);
}

int main(int argc, char **argv)
{
	struct stat st;
	void *map = NULL;
	int fd;

	if (argc != 4)
		errx(2, "usage: windows PLAN EXPECTED IMAGE");
	composer.mmap = mmap;
	if (composer_open(&composer, argv[1]) || !composer_ready(&composer))
		errx(1, "%s: no plan", argv[1]);
	fd = open(argv[2], O_RDONLY);
	if (fd < 0 || fstat(fd, &st))
		err(1, "%s", argv[2]);
	size = (uint64_t)st.st_size;
	expected = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (expected == MAP_FAILED || size != composer.plan->size)
		errx(1, "%s is not as large as the plan says", argv[2]);
	if (compose(&composer, &map, 0, size, 0, 2, COMPOSE_ALL) != -ENOMEM)
		errx(1, "more pieces than allowed");
	place_stays_taken();
	work_with_signals_and_forks();
	cut(argv[3]);
	return 0;
}
