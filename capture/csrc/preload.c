/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which file is the vmcore, and opening it; see preload.h. */
#define _GNU_SOURCE
#include "preload.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PLAN_VARIABLE "OLDMEM_RUN"

enum { OPENING = O_CREAT | O_TRUNC | O_ACCMODE };

struct preload preload;
static struct libc libc;

/* Looked up once; threads that look at the same time find the same. */
void *preload_next(void **cache, const char *name)
{
	void *found = __atomic_load_n(cache, __ATOMIC_RELAXED);

	if (!found) {
		found = dlsym(RTLD_NEXT, name);
		if (!found) {
			fprintf(stderr, "oldmem run: no %s() behind this library\n", name);
			_exit(1);
		}
		__atomic_store_n(cache, found, __ATOMIC_RELAXED);
	}
	return found;
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int not_ready;	/* errno */

static void give_up(const char *why)
{
	fprintf(stderr, "oldmem run: %s\n", why);
}

__attribute__((constructor))
static void start(void)
{
	const char *path = getenv(PLAN_VARIABLE);
	char why[256];

	if (!path || preload.active)
		return;
	libc = (struct libc){ NEXT(open), NEXT(close), NEXT(mmap), NEXT(munmap), NEXT(fstat) };
	if (compose_open(&preload.composer, &libc, path, why, sizeof(why))) {
		/* which file is to be guarded is not known: nothing may be read */
		give_up(why);
		_exit(1);
	}
	preload.active = true;
}

static void make_ready(void)
{
	char why[256];

	not_ready = -compose_ready(&preload.composer, why, sizeof(why));
	if (not_ready)
		give_up(why);
}

int preload_ready(void)
{
	pthread_once(&once, make_ready);
	return not_ready;
}

bool preload_is_target(const struct stat *st)
{
	const struct plan *plan = preload.composer.plan;

	return plan->ino && st->st_ino == plan->ino && st->st_dev == plan->dev;
}

bool preload_is_shape(const struct stat *st)
{
	const struct plan *plan = preload.composer.plan;

	return st->st_ino == plan->shape_ino && st->st_dev == plan->shape_dev;
}

bool preload_ours(int fd)
{
	struct stat st;
	int saved = errno;
	bool found = preload.active && !NEXT(fstat)(fd, &st) && preload_is_shape(&st);

	errno = saved;
	return found;
}

bool preload_named(int dirfd, const char *path)
{
	const struct plan *plan = preload.composer.plan;
	char here[PATH_MAX];
	int saved = errno;
	bool same = false;

	if (!preload.active || plan->ino || errno != ENOENT || !path)
		return false;
	if (path[0] == '/') {
		same = !strcmp(path, plan->name);
	} else if (dirfd == AT_FDCWD && getcwd(here, sizeof(here))) {
		size_t n = strlen(here);

		same = !strncmp(here, plan->name, n) && plan->name[n] == '/' && !strcmp(plan->name + n + 1, path);
	}
	errno = saved;
	return same;
}

/* The kernel's own vmcore is hidden below a socket, which cannot be opened. errno stays as it is. */
static bool covered(int dirfd, const char *path)
{
	struct stat st;
	bool found;

	if (!preload.active || errno != ENXIO || !path)
		return false;
	found = !NEXT(fstatat)(dirfd, path, &st, 0) && preload_is_target(&st);
	errno = ENXIO;
	return found;
}

int preload_open(int flags)
{
	int err, fd;

	if (flags & OPENING & ~O_CREAT) {
		errno = EACCES;
		return -1;
	}
	err = preload_ready();
	fd = err ? -err : compose_reopen(&preload.composer, preload.composer.plan->shape_fd, O_WRONLY);
	if (fd < 0) {
		errno = -fd;
		return -1;
	}
	if (!(flags & O_CLOEXEC))
		fcntl(fd, F_SETFD, 0);
	return fd;
}

/* `fd` is what opening `path` gave: the same, or ours in place of it. */
static int opened(int fd, int dirfd, const char *path, int flags)
{
	struct stat st;

	if (!preload.active)
		return fd;
	if (fd < 0)
		return preload_named(dirfd, path) || covered(dirfd, path) ? preload_open(flags) : fd;
	if (!preload.composer.plan->ino || flags & O_PATH || NEXT(fstat)(fd, &st) || !preload_is_target(&st))
		return fd;
	NEXT(close)(fd);
	return preload_open(flags);
}

static mode_t mode_of(int flags, va_list args)
{
	return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(args, mode_t) : 0;
}

EXPORT int open(const char *path, int flags, ...)
{
	va_list args;
	mode_t mode;

	va_start(args, flags);
	mode = mode_of(flags, args);
	va_end(args);
	return opened(NEXT(open)(path, flags, mode), AT_FDCWD, path, flags);
}

EXPORT int openat(int dirfd, const char *path, int flags, ...)
{
	va_list args;
	mode_t mode;

	va_start(args, flags);
	mode = mode_of(flags, args);
	va_end(args);
	return opened(NEXT(openat)(dirfd, path, flags, mode), dirfd, path, flags);
}

/* What _FORTIFY_SOURCE makes of calls without a mode. */
EXPORT int __open_2(const char *path, int flags)
{
	return opened(NEXT(open)(path, flags), AT_FDCWD, path, flags);
}

EXPORT int __openat_2(int dirfd, const char *path, int flags)
{
	return opened(NEXT(openat)(dirfd, path, flags), dirfd, path, flags);
}

ALSO(open64, open);
ALSO(openat64, openat);
ALSO(__open64_2, __open_2);
ALSO(__openat64_2, __openat_2);

/* stdio calls the kernel by itself: it gets a stream of ours. */
static ssize_t stream_read(void *cookie, char *buf, size_t n)
{
	return preload_read_on((int)(intptr_t)cookie, buf, n);
}

static int stream_seek(void *cookie, off64_t *offset, int whence)
{
	off_t at = NEXT(lseek)((int)(intptr_t)cookie, *offset, whence);

	if (at < 0)
		return -1;
	*offset = at;
	return 0;
}

static int stream_close(void *cookie)
{
	return NEXT(close)((int)(intptr_t)cookie);
}

EXPORT FILE *fopen(const char *path, const char *mode)
{
	const cookie_io_functions_t io = { .read = stream_read, .seek = stream_seek, .close = stream_close };
	struct stat st;
	FILE *file;
	int fd;

	if (!preload.active || *mode != 'r' || strchr(mode, '+') || stat(path, &st) || !preload_is_shape(&st))
		return NEXT(fopen)(path, mode);
	fd = preload_open(strchr(mode, 'e') ? O_CLOEXEC : 0);
	if (fd < 0)
		return NULL;
	file = fopencookie((void *)(intptr_t)fd, "r", io);
	if (!file)
		NEXT(close)(fd);
	return file;
}

ALSO(fopen64, fopen);
