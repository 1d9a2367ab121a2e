/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * gates IMAGE: many readers, while another thread puts rules in force and takes them out again, as guard/registry.py
 * does it. Of 64 pages page 0 is always refused; the image, of which page p is full of p + 1, ends behind page 59. All count
 * into one tally and log one after the other the same pages.
 */
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "physmem.h"

enum { PAGE = 4096, PAGES = 64, THERE = 60, RULES = 16, READERS = 4, ROUNDS = 300 };

#define CHECK(what) ((what) ? (void)0 : errx(1, "%s:%d: not true: %s", __FILE__, __LINE__, #what))

static int image;
static const struct gate *slot;
static uint64_t counters[RULES], runs[RULES][2];
static struct physmem_tally tally;
static struct physmem_log log_of_all;
static _Atomic int come;	/* so many rules are in force, and stay so, from page 0 on */
static _Atomic int ended;

/* Whatever was in force is kept: somebody may be asking it. */
static void *kept[ROUNDS * (RULES + 2)];
static size_t n_kept;

static void *keep(size_t n, size_t size)
{
	void *made = calloc(n, size);

	CHECK(made && n_kept < sizeof(kept) / sizeof(*kept));
	kept[n_kept++] = made;
	return made;
}

/* A gate with its own array, or one that shares the array of an earlier one and counts one rule more. */
static void install(struct gate_rule *rules, size_t n)
{
	struct gate *gate = keep(1, sizeof(*gate));

	*gate = (struct gate){ .n = n, .rules = rules };
	gate_install(&slot, gate);
}

/* Rule i refuses page i. */
static void fill(struct gate_rule *rule, size_t i)
{
	*rule = (struct gate_rule){
		.first = i,
		.end = i + 1,
		.set = { .end = UINT64_C(1) << 52, .n = 1, .data = runs[i] },
		.deny = true,
		.refused = &counters[i],
	};
}

static void *change(void *unused)
{
	for (int round = 0; round < ROUNDS; round++) {
		/* what was in force so far, in a new array, then one rule after the other behind that */
		struct gate_rule *rules = keep(RULES, sizeof(*rules));
		size_t staying = (size_t)(1 + round * (RULES - 1) / ROUNDS);

		for (size_t i = 0; i < staying; i++)
			rules[i] = slot->rules[i];
		install(rules, staying);
		for (size_t i = staying; i < RULES; i++) {
			fill(&rules[i], i);
			install(rules, i + 1);
			atomic_store(&come, (int)staying);
		}
	}
	atomic_store(&ended, 1);
	return unused;
}

static void *read_on(void *how)
{
	uint8_t *bytes = malloc(PAGES * PAGE);
	struct physmem_segment mine = { .size = PAGES * PAGE, .fd = image, .how = how ? PHYSMEM_MMAP : PHYSMEM_PREAD };
	struct physmem m = {
		.n = 1,
		.segments = &mine,
		.gate = &slot,
		.page_shift = 12,
		.window_size = 8 * PAGE,
		.tally = &tally,
		.log = &log_of_all,
	};
	uint64_t *reads = calloc(1, sizeof(*reads));

	CHECK(bytes && reads);
	for (int last = 0; !last; (*reads)++) {
		int sure = atomic_load(&come);

		last = atomic_load(&ended);
		physmem_read(&m, 0, bytes, PAGES * PAGE);
		for (int p = 0; p < PAGES; p++) {
			uint8_t first = bytes[p * PAGE];

			CHECK(first == bytes[p * PAGE + PAGE - 1]);
			CHECK(first == 0 || (first == p + 1 && p < THERE && p >= sure));
			CHECK(p < RULES || p >= THERE || first);
		}
	}
	physmem_unmap(&m);
	free(bytes);
	return reads;
}

int main(int argc, char **argv)
{
	pthread_t readers[READERS], changer;
	struct gate_rule *rules = keep(RULES, sizeof(*rules));
	uint64_t reads = 0;

	if (argc != 2)
		errx(2, "usage: gates IMAGE");
	image = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (image < 0)
		err(1, "%s", argv[1]);
	CHECK(!physmem_catch_sigbus());
	for (size_t i = 0; i < RULES; i++) {
		runs[i][0] = i;
		runs[i][1] = i + 1;
	}
	fill(rules, 0);
	install(rules, 1);
	atomic_store(&come, 1);
	for (long i = 0; i < READERS; i++)
		CHECK(!pthread_create(&readers[i], NULL, read_on, i % 2 ? &slot : NULL));
	CHECK(!pthread_create(&changer, NULL, change, NULL));
	CHECK(!pthread_join(changer, NULL));
	for (int i = 0; i < READERS; i++) {
		void *counted;

		CHECK(!pthread_join(readers[i], &counted));
		reads += *(uint64_t *)counted;
		free(counted);
	}
	CHECK(counters[0] == reads);
	CHECK(tally.bytes_read + tally.bytes_refused + tally.fault_pages * PAGE == reads * PAGES * PAGE);
	CHECK(tally.fault_pages == reads * (PAGES - THERE) && !tally.unlisted);
	CHECK(log_of_all.n);
	for (uint64_t i = 0; i < log_of_all.n; i++)
		CHECK(log_of_all.faults[i].error && log_of_all.faults[i].first >= THERE && log_of_all.faults[i].end <= PAGES);
	while (n_kept)
		free(kept[--n_kept]);
	puts("all as it should be");
	return 0;
}
