/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "faults.h"

#include <sys/mman.h>

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

bool faults_show_memory(const struct composer *c, uintptr_t at)
{
	struct vma vma;

	return vma_at(at, &vma) && page_of(c, &vma, at) >= 0;
}

static bool on_sigbus(const siginfo_t *info, void *context)
{
	const struct composer *c = __atomic_load_n(&catching, __ATOMIC_ACQUIRE);
	const uint64_t size = plan_page(c);
	uintptr_t at = (uintptr_t)info->si_addr & ~(uintptr_t)(size - 1);
	int saved = errno;
	int64_t page = -1;
	struct vma vma;

	(void)context;
	/* one that kill(2) has sent has no address */
	if (info->si_code > 0 && vma_at(at, &vma))
		page = page_of(c, &vma, at);
	if (page >= 0 && c->mmap((void *)at, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
	    MAP_FAILED)
		page = -1;
	if (page >= 0) {
		__atomic_fetch_or(&c->tally->failed[page / 64], UINT64_C(1) << page % 64, __ATOMIC_RELAXED);
		tally_add(&c->tally->faults, 1);
	}
	errno = saved;
	return page >= 0;
}

bool faults_catch(const struct composer *c)
{
	__atomic_store_n(&catching, c, __ATOMIC_RELEASE);
	return !sigbus_catch(on_sigbus);
}
