/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Calls of the kernel's that must not come back to the functions which preload.c puts in front of libc's, nor need a
 * libc that has them: there is no fstat() before glibc 2.33. All are async-signal-safe.
 */
#ifndef OLDMEM_SYS_H
#define OLDMEM_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A descriptor or -errno. */
static inline int sys_open(const char *path, int flags)
{
	long fd;

	do
		fd = syscall(SYS_openat, AT_FDCWD, path, flags, 0);
	while (fd < 0 && errno == EINTR);
	return fd < 0 ? -errno : (int)fd;
}

static inline void sys_close(int fd)
{
	syscall(SYS_close, fd);
}

static inline ssize_t sys_read(int fd, void *buf, size_t n)
{
	return syscall(SYS_read, fd, buf, n);
}

/* The kernel's struct stat is libc's on all 64-bit machines. */
static inline int sys_fstat(int fd, struct stat *st)
{
	return (int)syscall(SYS_fstat, fd, st);
}

static inline void sys_munmap(const void *at, size_t n)
{
	syscall(SYS_munmap, at, n);
}

#define PROC_FD_PATH 64

/* "/proc/<pid>/fd/<fd>" */
static inline const char *proc_fd_path(char path[PROC_FD_PATH], int64_t pid, int64_t fd)
{
	static const char middle[] = "/fd/";
	char *p = path + PROC_FD_PATH;

	*--p = 0;
	do
		*--p = (char)('0' + fd % 10);
	while (fd /= 10);
	for (size_t i = sizeof(middle) - 1; i; )
		*--p = middle[--i];
	do
		*--p = (char)('0' + pid % 10);
	while (pid /= 10);
	for (size_t i = 6; i; )
		*--p = "/proc/"[--i];
	return p;
}

#endif
