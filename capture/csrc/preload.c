/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The plan, and which descriptors are the vmcore's; see preload.h. */
#define _GNU_SOURCE
#include "preload.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PLAN_VARIABLE "OLDMEM_RUN"

/*
 * In the version that was there before dlsym() moved from libdl into libc (glibc 2.34), so that one library serves both.
 */
#ifdef __GLIBC__
#if defined(__x86_64__)
#define FIRST "GLIBC_2.2.5"
#elif defined(__s390x__)
#define FIRST "GLIBC_2.2"
#else
#define FIRST "GLIBC_2.17"
#endif
__asm__(".symver dlsym, dlsym@" FIRST);
#endif

struct preload preload;

static void *found[NEXT_COUNT];

static long missing(void)
{
	errno = ENOSYS;
	return -1;
}

void *preload_next(enum next_function which)
{
#define NEXT_NAME(name) #name,
	static const char *const names[] = { NEXT_FUNCTIONS(NEXT_NAME) };
	void *next = __atomic_load_n(&found[which], __ATOMIC_RELAXED);

	if (next)
		return next;
	next = dlsym(RTLD_NEXT, names[which]);
	/* stat() and its kin before glibc 2.33, where the programs that are there do not call it */
	if (!next)
		next = (void *)missing;
	__atomic_store_n(&found[which], next, __ATOMIC_RELAXED);
	return next;
}

__attribute__((constructor))
static void start(void)
{
	const char *path = getenv(PLAN_VARIABLE);
	char buffer[PROC_FD_PATH];
	int err;

	if (!path || preload.active)
		return;
	/* all of them: dlsym() may not be called in a signal handler, and read() may */
	for (int i = 0; i < NEXT_COUNT; i++)
		preload_next((enum next_function)i);
	preload.composer.mmap = NEXT(mmap);
	err = composer_open(&preload.composer, path);
	/* that another user's program cannot have it, or one that is left when all has ended, is in the nature of things */
	if (err == -EBADMSG)
		fprintf(stderr, "oldmem run: %s: not what this library was built for\n", path);
	if (err)
		return;
	path = proc_fd_path(buffer, preload.composer.plan->pid, preload.composer.plan->vmcore_fd);
	snprintf(preload.real, sizeof(preload.real), "%s", path);
	preload.active = true;
}

/*
 * What is known of a descriptor, which saves programs a question for each read of every other file. "Ours" is asked again
 * each time; "other" may be wrong where a descriptor came by a way that is not seen here: its reads are slower then.
 */
enum { UNKNOWN, OURS, OTHER };

static uint8_t known[4096];

void preload_unknown(int fd)
{
	if (fd >= 0 && fd < (int)sizeof(known))
		__atomic_store_n(&known[fd], UNKNOWN, __ATOMIC_RELAXED);
}

static bool is_vmcore(int fd, bool look_closer)
{
	const struct plan *plan = preload.composer.plan;
	struct stat st;
	long flags;

	if (sys_fstat(fd, &st) || st.st_ino != plan->ino || st.st_dev != plan->dev)
		return false;
	if (!look_closer)
		return true;
	flags = syscall(SYS_fcntl, fd, F_GETFL);
	return flags >= 0 && !(flags & (O_PATH | O_ACCMODE));
}

bool preload_ours(int fd)
{
	int saved = errno;
	uint8_t is;

	if (!preload.active || fd < 0 || fd >= (int)sizeof(known))
		return false;
	is = __atomic_load_n(&known[fd], __ATOMIC_RELAXED);
	if (is == OTHER)
		return false;
	is = is_vmcore(fd, is == UNKNOWN) ? OURS : OTHER;
	__atomic_store_n(&known[fd], is, __ATOMIC_RELAXED);
	errno = saved;
	return is == OURS && composer_ready(&preload.composer);
}

EXPORT int close(int fd)
{
	preload_unknown(fd);
	return NEXT(close)(fd);
}

EXPORT int dup2(int fd, int to)
{
	int made = NEXT(dup2)(fd, to);

	preload_unknown(to);
	return made;
}

EXPORT int dup3(int fd, int to, int flags)
{
	int made = NEXT(dup3)(fd, to, flags);

	preload_unknown(to);
	return made;
}
