/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "faults.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <time.h>

#include "sigbus.h"
#include "sys.h"
#include "vma.h"

static const struct composer *catching;	/* a signal handler has no argument to find it by */

static bool is_of(const struct composer *c, uint64_t index, const struct vma *vma)
{
	const struct plan_file *file = (const struct plan_file *)plan_part(c, c->plan->files) + index;

	return file->maps_dev == vma->dev && file->maps_ino == vma->ino;
}

/* The page's number among those of all segments, or -1 where the mapping shows no old memory. */
static int64_t page_of(const struct composer *c, const struct vma *vma, uintptr_t at)
{
	const struct plan_segment *s = plan_part(c, c->plan->segments), *end = s + c->plan->n_segments;
	const uint64_t offset = vma->offset + (at - vma->start);

	for (; s < end; s++)
		if (offset >= s->offset && offset - s->offset < s->size && is_of(c, s->file, vma))
			return (int64_t)(s->first_page + ((offset - s->offset) >> c->plan->page_shift));
	return -1;
}

bool faults_of_vmcore(const struct composer *c, uintptr_t at)
{
	struct vma vma;

	if (!vma_at(at, &vma))
		return false;
	if (!vma.dev && !vma.ino)
		return vma.read_only;
	return is_of(c, 0, &vma) || page_of(c, &vma, at) >= 0;
}

/* The kernel reads the word, and says EFAULT where this thread would get a signal. */
static bool is_readable(uintptr_t at)
{
	static const struct timespec at_once;

	return !syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, 0, &at_once, NULL, 0) || errno != EFAULT;
}

/*
 * A zero page at `at` if that is a page of ours. False where it is not, where the process has no room for mappings, and
 * where the command has ended: nobody would be told.
 */
static bool put_zeros(const struct composer *c, uintptr_t at)
{
	struct vma vma;
	int64_t page;

	if (!vma_at(at, &vma))
		return false;
	/* another thread, which wanted the same page, has been here before */
	if (!vma.dev && !vma.ino)
		return is_readable(at);
	page = page_of(c, &vma, at);
	if (page < 0)
		return false;
	/* in this order: either the mark is seen by who tells of it, or it is known here that nobody tells any more */
	__atomic_fetch_or(&c->tally->failed[page / 64], UINT64_C(1) << page % 64, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&c->tally->ended, __ATOMIC_SEQ_CST))
		return false;
	return c->mmap((void *)at, plan_page(c), PROT_READ, COMPOSER_EMPTY | MAP_FIXED, -1, 0) != MAP_FAILED;
}

static bool on_sigbus(const siginfo_t *info, void *context)
{
	const struct composer *c = __atomic_load_n(&catching, __ATOMIC_ACQUIRE);

	(void)context;
	return sigbus_is_fault(info) && put_zeros(c, (uintptr_t)info->si_addr & ~(uintptr_t)(plan_page(c) - 1));
}

bool faults_catch(const struct composer *c)
{
	__atomic_store_n(&catching, c, __ATOMIC_RELEASE);
	return !sigbus_catch(on_sigbus);
}
