/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * LD_PRELOADed, a Xen that answers HVMOP_get_mem_type on any file: MMIO_DM="first-end ..." are the pages (hexadecimal,
 * the end not included) without memory, FAIL="errno first-end ..." those for which the question fails.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#define HYPERCALL 0x305000

static bool listed(const char *list, uint64_t pfn)
{
	while (list && *list) {
		char *next;
		uint64_t first = strtoull(list, &next, 16), end = strtoull(next + 1, &next, 16);

		if (first <= pfn && pfn < end)
			return true;
		list = *next ? next + 1 : NULL;
	}
	return false;
}

int ioctl(int fd, unsigned long request, ...)
{
	static const char *mmio_dm, *fail;
	static bool asked;
	uint64_t *call;
	va_list args;

	va_start(args, request);
	call = va_arg(args, uint64_t *);
	va_end(args);
	if (request != HYPERCALL)
		return ((int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl"))(fd, request, call);
	if (!asked) {
		mmio_dm = getenv("MMIO_DM");
		fail = getenv("FAIL");
		asked = true;
	}
	/* hvm_op, HVMOP_get_mem_type */
	if (call[0] != 34 || call[1] != 15 || call[3] || call[4] || call[5]) {
		errno = ENOSYS;
		return -1;
	}
	uint16_t *question = (uint16_t *)(uintptr_t)call[2];
	uint64_t pfn = *(uint64_t *)(question + 4);

	if (question[0] != 0x7ff0) {
		errno = ESRCH;
		return -1;
	}
	if (fail) {
		char *pages;
		int error = (int)strtol(fail, &pages, 10);

		if (listed(*pages ? pages + 1 : NULL, pfn)) {
			errno = error;
			return -1;
		}
	}
	question[1] = listed(mmio_dm, pfn) ? 2 : 0;
	return 0;
}
