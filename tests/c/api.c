/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * api GUARD IMAGE DAMAGED, absolute paths: every function of oldmem_guard.h, right and wrong arguments, and many
 * threads on one handle.
 *
 * tests/c/__init__.py makes the files: of 64 pages of 4 KiB, rule 0 refuses [4, 8), and rule 1, in its domain [16, 32),
 * every first of two pages in a row by turns of two. Page p of the image is full of p + 1; it ends behind page 59.
 */
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <oldmem_guard.h>

enum { PAGE = 4096, PAGES = 64, THERE = 60, MAPPED = 32, THREADS = 24, ROUNDS = 60 };

#define LIMIT (UINT64_C(1) << 52)
#define CHECK(what) ((what) ? (void)0 : errx(1, "%s:%d: not true: %s", __FILE__, __LINE__, #what))
#define GOOD(call) CHECK((call) == OLDMEM_GUARD_OK)
#define INVALID(call) CHECK((call) == OLDMEM_GUARD_INVALID)

static int rule_of(uint64_t p)
{
	if (p >= 4 && p < 8)
		return 0;
	return p >= 16 && p < 32 && (p - 16) / 2 % 2 == 0 ? 1 : OLDMEM_GUARD_NO_RULE;
}

/* What a read of the byte must give. */
static uint8_t byte_of(uint64_t paddr)
{
	uint64_t p = paddr / PAGE;

	return p < THERE && rule_of(p) < 0 ? (uint8_t)(p + 1) : 0;
}

static void wrong_arguments(oldmem_guard *g, int fd)
{
	static uint8_t bytes[PAGE];
	const char *text = "";
	uint64_t n = 7, words[2] = { 5, 5 };
	oldmem_guard_counters counters = { .bytes_read = 9 };
	unsigned shift = 7;
	size_t rules = 7;
	int answer = 7;

	/* g is a handle without a file, or none */
	INVALID(oldmem_guard_is_ram(g, 0, &answer));
	CHECK(answer == 0);
	INVALID(oldmem_guard_why(g, 0, &answer));
	CHECK(answer == OLDMEM_GUARD_NO_RULE);
	INVALID(oldmem_guard_next_ram(g, 0, 1, &n));
	CHECK(n == 0);
	INVALID(oldmem_guard_next_refused(g, 0, 1, &n));
	INVALID(oldmem_guard_fill(g, 0, 1, words));
	CHECK(words[0] == 5);
	INVALID(oldmem_guard_rules(g, &rules));
	CHECK(rules == 0);
	INVALID(oldmem_guard_rule(g, 0, &text, &text, &n));
	CHECK(!text);
	INVALID(oldmem_guard_page_shift(g, &shift));
	CHECK(shift == 0);
	INVALID(oldmem_guard_get_counters(g, &counters, sizeof(counters)));
	CHECK(counters.bytes_read == 0);
	INVALID(oldmem_guard_read(g, 0, bytes, 1));
	INVALID(oldmem_guard_add_segment(g, fd, 0, 0, PAGE, OLDMEM_GUARD_PREAD));
}

static void opening(oldmem_guard *g, const char *guard, const char *damaged, int fd)
{
	wrong_arguments(NULL, fd);
	wrong_arguments(g, fd);
	CHECK(strstr(oldmem_guard_error(g), "no compiled guard is open"));
	INVALID(oldmem_guard_open(NULL, guard));
	INVALID(oldmem_guard_open(g, NULL));
	CHECK(oldmem_guard_open(g, "/nothing\nthere") == OLDMEM_GUARD_SYSTEM);
	CHECK(!strcmp(oldmem_guard_error(g), "/nothing?there: No such file or directory"));
	CHECK(oldmem_guard_open(g, damaged) == OLDMEM_GUARD_DAMAGED);
	CHECK(strstr(oldmem_guard_error(g), damaged) == oldmem_guard_error(g));
	wrong_arguments(g, fd);
	GOOD(oldmem_guard_open(g, guard));
	INVALID(oldmem_guard_open(g, guard));
	CHECK(strstr(oldmem_guard_error(g), "already"));
	CHECK(strlen(oldmem_guard_error(NULL)));
	for (int i = -1; i < 8; i++)
		CHECK(strlen(oldmem_guard_status_text((oldmem_guard_status)i)));
}

static void questions(const oldmem_guard *g)
{
	uint64_t found, words[3], refused;
	const char *name, *reason;
	unsigned shift;
	size_t rules;
	int answer;

	GOOD(oldmem_guard_page_shift(g, &shift));
	CHECK(shift == 12);
	INVALID(oldmem_guard_page_shift(g, NULL));
	GOOD(oldmem_guard_rules(g, &rules));
	CHECK(rules == 2);
	INVALID(oldmem_guard_rules(g, NULL));
	GOOD(oldmem_guard_rule(g, 0, &name, &reason, &refused));
	CHECK(!strcmp(name, "balloon") && !strcmp(reason, "given back") && refused == 0);
	GOOD(oldmem_guard_rule(g, 1, &name, NULL, NULL));
	CHECK(!strcmp(name, "device"));
	INVALID(oldmem_guard_rule(g, 2, &name, NULL, NULL));
	INVALID(oldmem_guard_rule(g, -1, &name, NULL, NULL));
	CHECK(!name);

	for (uint64_t p = 0; p < PAGES + 10; p++) {
		GOOD(oldmem_guard_why(g, p, &answer));
		CHECK(answer == rule_of(p));
		GOOD(oldmem_guard_is_ram(g, p, &answer));
		CHECK(answer == (rule_of(p) < 0));
	}
	GOOD(oldmem_guard_next_ram(g, 4, 30, &found));
	CHECK(found == 8);
	GOOD(oldmem_guard_next_ram(g, 4, 6, &found));
	CHECK(found == 6);
	GOOD(oldmem_guard_next_refused(g, 8, LIMIT, &found));
	CHECK(found == 16);
	GOOD(oldmem_guard_next_refused(g, 40, LIMIT, &found));
	CHECK(found == LIMIT);
	GOOD(oldmem_guard_next_refused(g, LIMIT, LIMIT, &found));
	INVALID(oldmem_guard_next_ram(g, 5, 4, &found));
	INVALID(oldmem_guard_next_ram(g, 5, LIMIT + 1, &found));
	INVALID(oldmem_guard_next_ram(g, 5, 6, NULL));
	GOOD(oldmem_guard_is_ram(g, LIMIT - 1, &answer));
	CHECK(answer == 1);
	INVALID(oldmem_guard_is_ram(g, LIMIT, &answer));
	CHECK(answer == 0);
	INVALID(oldmem_guard_is_ram(g, UINT64_MAX, &answer));
	INVALID(oldmem_guard_is_ram(g, 0, NULL));
	INVALID(oldmem_guard_why(g, LIMIT, &answer));
	INVALID(oldmem_guard_why(g, 0, NULL));

	for (uint64_t from = 0; from < 40; from++) {
		for (uint64_t n = 0; n <= 128; n += 1 + n / 9) {
			words[0] = words[1] = words[2] = UINT64_MAX;
			GOOD(oldmem_guard_fill(g, from, n, words));
			for (uint64_t i = 0; i < (n + 63) / 64 * 64; i++)
				CHECK((words[i / 64] >> i % 64 & 1) == (i < n && rule_of(from + i) < 0));
			CHECK(words[(n + 63) / 64] == UINT64_MAX);
		}
	}
	GOOD(oldmem_guard_fill(g, LIMIT - 64, 64, words));
	CHECK(words[0] == UINT64_MAX);
	GOOD(oldmem_guard_fill(g, LIMIT, 0, NULL));
	INVALID(oldmem_guard_fill(g, LIMIT - 64, 65, words));
	INVALID(oldmem_guard_fill(g, 1, UINT64_MAX, words));
	INVALID(oldmem_guard_fill(g, 0, 1, NULL));
}

static void segments(oldmem_guard *g, int fd)
{
	const uint64_t top = UINT64_MAX - PAGE + 1;
	uint8_t bytes[32];

	memset(bytes, 1, sizeof(bytes));
	GOOD(oldmem_guard_read(g, 0, bytes, sizeof(bytes)));	/* no segment yet */
	CHECK(!bytes[0] && !bytes[31]);
	INVALID(oldmem_guard_add_segment(g, fd, 0, 0, 0, OLDMEM_GUARD_PREAD));
	INVALID(oldmem_guard_add_segment(g, fd, 0, 1, PAGE, OLDMEM_GUARD_PREAD));
	INVALID(oldmem_guard_add_segment(g, fd, 0, 0, PAGE + 1, OLDMEM_GUARD_PREAD));
	CHECK(strstr(oldmem_guard_error(g), "not whole pages"));
	INVALID(oldmem_guard_add_segment(g, fd, 1, 0, PAGE, OLDMEM_GUARD_MMAP));
	INVALID(oldmem_guard_add_segment(g, fd, INT64_MAX, 0, PAGE, OLDMEM_GUARD_PREAD));
	INVALID(oldmem_guard_add_segment(g, fd, 0, top, 2 * PAGE, OLDMEM_GUARD_PREAD));
	CHECK(strstr(oldmem_guard_error(g), "not possible"));
	INVALID(oldmem_guard_add_segment(g, fd, 0, 0, PAGE, (oldmem_guard_how)2));
	CHECK(oldmem_guard_add_segment(g, -1, 0, 0, PAGE, OLDMEM_GUARD_PREAD) == OLDMEM_GUARD_SYSTEM);
	CHECK(strstr(oldmem_guard_error(g), "Bad file descriptor"));

	/* the file ends before this one does: SIGBUS */
	GOOD(oldmem_guard_add_segment(g, fd, MAPPED * PAGE, MAPPED * PAGE, (PAGES - MAPPED) * PAGE,
				      OLDMEM_GUARD_MMAP));
	GOOD(oldmem_guard_read(g, MAPPED * PAGE, bytes, 1));	/* leaves a window, which the next segment must outlive */
	CHECK(bytes[0] == byte_of(MAPPED * PAGE));
	GOOD(oldmem_guard_add_segment(g, fd, 0, 0, MAPPED * PAGE, OLDMEM_GUARD_PREAD));
	INVALID(oldmem_guard_add_segment(g, fd, 0, 0, PAGE, OLDMEM_GUARD_PREAD));
	INVALID(oldmem_guard_add_segment(g, fd, 0, (MAPPED - 1) * PAGE, PAGE, OLDMEM_GUARD_PREAD));
	INVALID(oldmem_guard_add_segment(g, fd, 0, (PAGES - 1) * PAGE, 5 * PAGE, OLDMEM_GUARD_PREAD));
	CHECK(strstr(oldmem_guard_error(g), "overlaps"));
	GOOD(oldmem_guard_add_segment(g, fd, 0, top, PAGE, OLDMEM_GUARD_PREAD));
	close(fd);	/* the handle has its own */
}

static void reads(oldmem_guard *g)
{
	static uint8_t bytes[(PAGES + 2) * PAGE];
	oldmem_guard_counters c, part;
	uint64_t refused;

	GOOD(oldmem_guard_get_counters(g, &part, sizeof(part)));
	memset(bytes, 0xff, sizeof(bytes));
	GOOD(oldmem_guard_read(g, 0, bytes, sizeof(bytes)));
	for (uint64_t i = 0; i < sizeof(bytes); i++)
		CHECK(bytes[i] == byte_of(i));
	GOOD(oldmem_guard_get_counters(g, &c, sizeof(c)));
	CHECK(c.bytes_read - part.bytes_read == (THERE - 4 - 8) * PAGE);
	CHECK(c.bytes_refused == 12 * PAGE && c.pages_refused == 12);
	CHECK(c.pages_failed - part.pages_failed == PAGES - THERE + 2);
	GOOD(oldmem_guard_rule(g, 1, NULL, NULL, &refused));
	CHECK(refused == 8);

	memset(&c, 0xff, sizeof(c));
	GOOD(oldmem_guard_get_counters(g, &c, sizeof(c.bytes_read)));
	CHECK(c.bytes_read && c.bytes_refused == UINT64_MAX);
	INVALID(oldmem_guard_get_counters(g, NULL, sizeof(c)));

	GOOD(oldmem_guard_read(g, 3 * PAGE + 4090, bytes, 20));
	CHECK(bytes[5] == 4 && bytes[6] == 0);
	GOOD(oldmem_guard_read(g, 0, NULL, 0));
	INVALID(oldmem_guard_read(g, 0, NULL, 1));
	memset(bytes, 0xff, 100);
	GOOD(oldmem_guard_read(g, UINT64_MAX - 9, bytes, 100));
	CHECK(bytes[9] == 1 && bytes[10] == 0 && bytes[99] == 0);
}

struct reader {
	oldmem_guard *guard;
	pthread_t thread;
	unsigned seed;
	uint64_t refused[2], failed;	/* pages that must have been counted for it */
};

static void *read_at_random(void *argument)
{
	struct reader *r = argument;
	uint8_t *bytes = malloc(PAGES * PAGE);

	CHECK(bytes);
	for (int round = 0; round < ROUNDS; round++) {
		uint64_t at = (uint64_t)rand_r(&r->seed) % (PAGES * PAGE);
		uint64_t n = (uint64_t)rand_r(&r->seed) % (PAGES * PAGE - at) + 1;

		memset(bytes, 0xff, n);
		GOOD(oldmem_guard_read(r->guard, at, bytes, n));
		for (uint64_t i = 0; i < n; i += 1 + (n - 1 - i) % 61)
			CHECK(bytes[i] == byte_of(at + i));
		for (uint64_t p = at / PAGE; p <= (at + n - 1) / PAGE; p++) {
			if (rule_of(p) >= 0)
				r->refused[rule_of(p)]++;
			else if (p >= THERE)
				r->failed++;
		}
	}
	free(bytes);
	return NULL;
}

static void *ask_all_the_time(void *argument)
{
	const struct reader *r = argument;
	uint64_t words[1], seen = 0;

	for (int round = 0; round < 50 * ROUNDS; round++) {
		oldmem_guard_counters c;
		uint64_t found, refused;
		int rule;

		GOOD(oldmem_guard_why(r->guard, (uint64_t)round % PAGES, &rule));
		CHECK(rule == rule_of((uint64_t)round % PAGES));
		GOOD(oldmem_guard_next_ram(r->guard, 4, PAGES, &found));
		CHECK(found == 8);
		GOOD(oldmem_guard_fill(r->guard, 4, 16, words));
		CHECK(words[0] == 0xcff0);
		GOOD(oldmem_guard_rule(r->guard, 1, NULL, NULL, &refused));
		CHECK(refused >= seen);
		seen = refused;
		GOOD(oldmem_guard_get_counters(r->guard, &c, sizeof(c)));
	}
	return NULL;
}

static void threads(oldmem_guard *g)
{
	struct reader readers[THREADS] = { 0 }, asker = { .guard = g };
	uint64_t before[2], after, sum[2] = { 0, 0 }, failed = 0;
	oldmem_guard_counters first, last;

	GOOD(oldmem_guard_get_counters(g, &first, sizeof(first)));
	for (int i = 0; i < 2; i++)
		GOOD(oldmem_guard_rule(g, i, NULL, NULL, &before[i]));
	for (int i = 0; i < THREADS; i++) {
		readers[i].guard = g;
		readers[i].seed = (unsigned)i;
		CHECK(!pthread_create(&readers[i].thread, NULL, read_at_random, &readers[i]));
	}
	CHECK(!pthread_create(&asker.thread, NULL, ask_all_the_time, &asker));
	CHECK(!pthread_join(asker.thread, NULL));
	for (int i = 0; i < THREADS; i++) {
		CHECK(!pthread_join(readers[i].thread, NULL));
		sum[0] += readers[i].refused[0];
		sum[1] += readers[i].refused[1];
		failed += readers[i].failed;
	}
	for (int i = 0; i < 2; i++) {
		GOOD(oldmem_guard_rule(g, i, NULL, NULL, &after));
		CHECK(after - before[i] == sum[i]);
	}
	GOOD(oldmem_guard_get_counters(g, &last, sizeof(last)));
	CHECK(last.pages_refused - first.pages_refused == sum[0] + sum[1]);
	CHECK(last.pages_failed - first.pages_failed == failed);
}

/* True if the process has something of the file mapped. */
static int is_mapped(const char *path)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[4096 + 256];
	int found = 0;

	CHECK(maps);
	while (fgets(line, sizeof(line), maps))
		found |= strstr(line, path) != NULL;
	fclose(maps);
	return found;
}

int main(int argc, char **argv)
{
	oldmem_guard *g;
	int fd;

	if (argc != 4)
		errx(2, "usage: api GUARD IMAGE DAMAGED");
	fd = open(argv[2], O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		err(1, "%s", argv[2]);
	INVALID(oldmem_guard_new(NULL));
	GOOD(oldmem_guard_new(&g));
	CHECK(!strcmp(oldmem_guard_error(g), ""));
	opening(g, argv[1], argv[3], fd);
	questions(g);
	segments(g, fd);
	reads(g);
	threads(g);
	CHECK(is_mapped(argv[1]) && is_mapped(argv[2]));
	oldmem_guard_close(g);
	CHECK(!is_mapped(argv[1]) && !is_mapped(argv[2]));
	oldmem_guard_close(NULL);
	puts("all as it should be");
	return 0;
}
