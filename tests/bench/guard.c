/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What guard.py measures, through oldmem_guard.h: the best of many rounds, in CPU time, for others use the machine too.
 *
 *	fill GUARD PFN END	million pfns a second, in pieces of a million
 *	ask GUARD PFN END	nanoseconds for an is_ram() of a pfn at random
 *	open GUARD		milliseconds
 *	read GUARD IMAGE	a line a round: seconds through the guard, seconds by pread
 */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <oldmem_guard.h>

enum { ROUNDS = 15, READS = 40, PIECE = 1 << 20, ASKED = 1 << 20 };

static uint64_t words[PIECE / 64], pfns[ASKED];
static char block[PIECE];

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static oldmem_guard *opened(const char *path)
{
	oldmem_guard *g;

	if (oldmem_guard_new(&g) || oldmem_guard_open(g, path))
		errx(1, "%s", oldmem_guard_error(g));
	return g;
}

static double fill(const oldmem_guard *g, uint64_t pfn, uint64_t end)
{
	double start = now();

	for (uint64_t p = pfn; p < end; p += PIECE)
		if (oldmem_guard_fill(g, p, end - p < PIECE ? end - p : PIECE, words))
			errx(1, "fill failed");
	return (now() - start) / (double)(end - pfn);
}

static double ask(const oldmem_guard *g, uint64_t pfn, uint64_t end)
{
	uint64_t state = 1;
	double start;
	int ram, all = 0;

	for (size_t i = 0; i < ASKED; i++) {
		state = state * UINT64_C(6364136223846793005) + 1442695040888963407;
		pfns[i] = pfn + (state >> 20) % (end - pfn);
	}
	start = now();
	for (size_t i = 0; i < ASKED; i++) {
		oldmem_guard_is_ram(g, pfns[i], &ram);
		all += ram;
	}
	start = now() - start;
	if (!all || all == ASKED)
		errx(1, "not fragmented");
	return start / ASKED;
}

static double open_and_close(const char *path)
{
	double start = now();
	oldmem_guard *g = opened(path);

	start = now() - start;
	oldmem_guard_close(g);
	return start;
}

static double guarded_read(oldmem_guard *g, off_t size)
{
	double start = now();

	for (off_t at = 0; at < size; at += PIECE)
		oldmem_guard_read(g, (uint64_t)at, block, PIECE);
	return now() - start;
}

static double plain_read(int fd, off_t size)
{
	double start = now();

	for (off_t at = 0; at < size; at += PIECE)
		if (pread(fd, block, PIECE, at) != PIECE)
			err(1, "pread");
	return now() - start;
}

static void compare_reads(oldmem_guard *g, const char *image)
{
	int fd = open(image, O_RDONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st))
		err(1, "%s", image);
	if (oldmem_guard_add_segment(g, fd, 0, 0, (uint64_t)st.st_size, OLDMEM_GUARD_PREAD))
		errx(1, "%s", oldmem_guard_error(g));
	for (int i = 0; i < READS; i++) {
		/* by turns who is first */
		double first = i % 2 ? plain_read(fd, st.st_size) : guarded_read(g, st.st_size);
		double second = i % 2 ? guarded_read(g, st.st_size) : plain_read(fd, st.st_size);

		printf("%g %g\n", i % 2 ? second : first, i % 2 ? first : second);
	}
}

int main(int argc, char **argv)
{
	double best = 1e9, took;

	if (argc < 3)
		errx(2, "usage: guard fill|ask|open|read GUARD ...");
	if (!strcmp(argv[1], "read") && argc == 4) {
		compare_reads(opened(argv[2]), argv[3]);
		return 0;
	}
	for (int i = 0; i < ROUNDS; i++) {
		if (!strcmp(argv[1], "open")) {
			took = open_and_close(argv[2]) * 1e3;
		} else if (argc == 5) {
			oldmem_guard *g = opened(argv[2]);
			uint64_t pfn = strtoull(argv[3], NULL, 0), end = strtoull(argv[4], NULL, 0);

			took = !strcmp(argv[1], "ask") ? ask(g, pfn, end) * 1e9 : fill(g, pfn, end);
			oldmem_guard_close(g);
		} else {
			errx(2, "wrong arguments");
		}
		best = took < best ? took : best;
	}
	printf("%g\n", !strcmp(argv[1], "fill") ? 1e-6 / best : best);
	return 0;
}
