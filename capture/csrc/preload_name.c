/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opening and looking at the vmcore by its name, also where no file has it; see preload.h. */
#define _GNU_SOURCE
#include "preload.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>

/* The folder that a relative path starts from: its length, 0 if that is not to be had. */
static size_t folder_of(int dirfd, char *path, size_t room)
{
	char link[PROC_FD_PATH + 16] = "/proc/self/cwd";
	long n;

	if (dirfd != AT_FDCWD)
		snprintf(link, sizeof(link), "/proc/self/fd/%d", dirfd);
	n = syscall(SYS_readlinkat, AT_FDCWD, link, path, room);
	return n > 0 && (size_t)n < room ? (size_t)n : 0;
}

/*
 * Does what leads to the vmcore still do so? In another pid namespace, or when that process is gone and its number is
 * another's, it leads to some other file, or to none.
 */
static bool is_real(void)
{
	const struct plan *plan = preload.composer.plan;
	struct stat st;

	return !syscall(SYS_newfstatat, AT_FDCWD, preload.real, &st, 0) && st.st_dev == plan->dev && st.st_ino == plan->ino;
}

bool preload_named(int dirfd, const char *path)
{
	char folder[PATH_MAX];
	const char *name = preload.active ? preload.composer.plan->name : "";
	bool same = false;

	if (!*name || errno != ENOENT || !path)
		return false;
	if (*path == '/') {
		same = !strcmp(path, name);
	} else {
		size_t n = folder_of(dirfd, folder, sizeof(folder));

		while (!strncmp(path, "./", 2))
			path += 2;
		same = n && !strncmp(folder, name, n) && name[n] == '/' && !strcmp(name + n + 1, path);
	}
	same = same && is_real();
	errno = ENOENT;
	return same;
}

static mode_t mode_of(int flags, va_list args)
{
	return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(args, mode_t) : 0;
}

/* What opening `path` gave, or would have given if it were there. */
static int opened(int fd, int dirfd, const char *path, int flags)
{
	if (fd < 0 && preload_named(dirfd, path))
		fd = NEXT(open)(preload.real, flags & ~O_NOFOLLOW);
	preload_unknown(fd);
	return fd;
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
	return opened(NEXT(__open_2)(path, flags), AT_FDCWD, path, flags);
}

EXPORT int __openat_2(int dirfd, const char *path, int flags)
{
	return opened(NEXT(__openat_2)(dirfd, path, flags), dirfd, path, flags);
}

ALSO(open64, open);
ALSO(openat64, openat);
ALSO(__open64_2, __open_2);
ALSO(__openat64_2, __openat_2);

/* stdio calls the kernel by itself. */
EXPORT FILE *fopen(const char *path, const char *mode)
{
	FILE *file = NEXT(fopen)(path, mode);

	return file || !preload_named(AT_FDCWD, path) ? file : NEXT(fopen)(preload.real, mode);
}

/* libc has closed the stream by the time it finds no file: so the name is looked up first. */
EXPORT FILE *freopen(const char *path, const char *mode, FILE *stream)
{
	int saved = errno;

	if (path && preload.active && *mode == 'r' && NEXT(faccessat)(AT_FDCWD, path, F_OK, 0) &&
	    preload_named(AT_FDCWD, path))
		path = preload.real;
	errno = saved;
	return NEXT(freopen)(path, mode, stream);
}

ALSO(fopen64, fopen);
ALSO(freopen64, freopen);

/*
 * The link to the vmcore is followed, whatever was asked: the file that it leads to is what the name stands for. These
 * three are libc's own only since glibc 2.33, and what programs of before call is below.
 */
EXPORT int stat(const char *path, struct stat *st)
{
	int result = NEXT(stat)(path, st);

	return result && preload_named(AT_FDCWD, path) ? NEXT(stat)(preload.real, st) : result;
}

EXPORT int lstat(const char *path, struct stat *st)
{
	int result = NEXT(lstat)(path, st);

	return result && preload_named(AT_FDCWD, path) ? NEXT(stat)(preload.real, st) : result;
}

EXPORT int fstatat(int dirfd, const char *path, struct stat *st, int flags)
{
	int result = NEXT(fstatat)(dirfd, path, st, flags);

	return result && preload_named(dirfd, path) ? NEXT(stat)(preload.real, st) : result;
}

EXPORT int stat64(const char *path, struct stat64 *st)
{
	return stat(path, (struct stat *)st);
}

EXPORT int lstat64(const char *path, struct stat64 *st)
{
	return lstat(path, (struct stat *)st);
}

EXPORT int fstatat64(int dirfd, const char *path, struct stat64 *st, int flags)
{
	return fstatat(dirfd, path, (struct stat *)st, flags);
}

/* Of `version` there is one on each 64-bit machine; declared nowhere any more. */
int __xstat(int version, const char *path, struct stat *st);
int __lxstat(int version, const char *path, struct stat *st);
int __fxstatat(int version, int dirfd, const char *path, struct stat *st, int flags);

EXPORT int __xstat(int version, const char *path, struct stat *st)
{
	int result = NEXT(__xstat)(version, path, st);

	return result && preload_named(AT_FDCWD, path) ? NEXT(__xstat)(version, preload.real, st) : result;
}

EXPORT int __lxstat(int version, const char *path, struct stat *st)
{
	int result = NEXT(__lxstat)(version, path, st);

	return result && preload_named(AT_FDCWD, path) ? NEXT(__xstat)(version, preload.real, st) : result;
}

EXPORT int __fxstatat(int version, int dirfd, const char *path, struct stat *st, int flags)
{
	int result = NEXT(__fxstatat)(version, dirfd, path, st, flags);

	return result && preload_named(dirfd, path) ? NEXT(__xstat)(version, preload.real, st) : result;
}

ALSO(__xstat64, __xstat);
ALSO(__lxstat64, __lxstat);
ALSO(__fxstatat64, __fxstatat);

EXPORT int statx(int dirfd, const char *path, int flags, unsigned mask, struct statx *stx)
{
	int result = NEXT(statx)(dirfd, path, flags, mask, stx);

	if (!result || !preload_named(dirfd, path))
		return result;
	return NEXT(statx)(AT_FDCWD, preload.real, flags & ~AT_SYMLINK_NOFOLLOW, mask, stx);
}

EXPORT int access(const char *path, int how)
{
	int result = NEXT(access)(path, how);

	return result && preload_named(AT_FDCWD, path) ? NEXT(access)(preload.real, how) : result;
}

EXPORT int euidaccess(const char *path, int how)
{
	int result = NEXT(euidaccess)(path, how);

	return result && preload_named(AT_FDCWD, path) ? NEXT(euidaccess)(preload.real, how) : result;
}

ALSO(eaccess, euidaccess);

EXPORT int faccessat(int dirfd, const char *path, int how, int flags)
{
	int result = NEXT(faccessat)(dirfd, path, how, flags);

	if (!result || !preload_named(dirfd, path))
		return result;
	return NEXT(faccessat)(AT_FDCWD, preload.real, how, flags & ~AT_SYMLINK_NOFOLLOW);
}

/* Our file has none, and says so as the kernel does for it. */
static ssize_t no_attributes(ssize_t result, const char *path)
{
	if (result < 0 && preload_named(AT_FDCWD, path))
		errno = EOPNOTSUPP;
	return result;
}

EXPORT ssize_t getxattr(const char *path, const char *name, void *value, size_t n)
{
	return no_attributes(NEXT(getxattr)(path, name, value, n), path);
}

EXPORT ssize_t lgetxattr(const char *path, const char *name, void *value, size_t n)
{
	return no_attributes(NEXT(lgetxattr)(path, name, value, n), path);
}

EXPORT ssize_t listxattr(const char *path, char *list, size_t n)
{
	return no_attributes(NEXT(listxattr)(path, list, n), path);
}

EXPORT ssize_t llistxattr(const char *path, char *list, size_t n)
{
	return no_attributes(NEXT(llistxattr)(path, list, n), path);
}
