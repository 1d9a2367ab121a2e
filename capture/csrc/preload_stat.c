/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the vmcore looks like to stat(2) and its kin. */
#define _GNU_SOURCE
#include "preload.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* The answer to some stat() of `path`, with the vmcore's own in place of what stands for it. */
static int told(int result, int dirfd, const char *path, struct stat *st)
{
	int fd;

	if (!preload.active)
		return result;
	if (result ? !preload_named(dirfd, path) : !preload_is_target(st) && !preload_is_shape(st))
		return result;
	if (result || preload_is_target(st)) {
		fd = compose_reopen(&preload.composer, preload.composer.plan->shape_fd, O_WRONLY);
		if (fd < 0 || NEXT(fstat)(fd, st)) {
			errno = fd < 0 ? -fd : EIO;
			return -1;
		}
		NEXT(close)(fd);
	}
	st->st_mode = S_IFREG | 0400;
	st->st_nlink = 1;
	/* as the file has no holes that SEEK_HOLE could tell, it must not look as if it had any */
	st->st_blocks = (blkcnt_t)((st->st_size + 511) / 512);
	return 0;
}

EXPORT int fstat(int fd, struct stat *st)
{
	return told(NEXT(fstat)(fd, st), fd, NULL, st);
}

EXPORT int stat(const char *path, struct stat *st)
{
	return told(NEXT(stat)(path, st), AT_FDCWD, path, st);
}

EXPORT int lstat(const char *path, struct stat *st)
{
	return told(NEXT(lstat)(path, st), AT_FDCWD, path, st);
}

EXPORT int fstatat(int dirfd, const char *path, struct stat *st, int flags)
{
	return told(NEXT(fstatat)(dirfd, path, st, flags), dirfd, path, st);
}

EXPORT int stat64(const char *path, struct stat64 *st)
{
	return stat(path, (struct stat *)st);
}

EXPORT int lstat64(const char *path, struct stat64 *st)
{
	return lstat(path, (struct stat *)st);
}

EXPORT int fstat64(int fd, struct stat64 *st)
{
	return fstat(fd, (struct stat *)st);
}

EXPORT int fstatat64(int dirfd, const char *path, struct stat64 *st, int flags)
{
	return fstatat(dirfd, path, (struct stat *)st, flags);
}

/* What programs call that were linked before glibc 2.33; `version` is that of struct stat, the kernel's and ours. */
EXPORT int __fxstat(int version, int fd, struct stat *st)
{
	(void)version;
	return fstat(fd, st);
}

EXPORT int __xstat(int version, const char *path, struct stat *st)
{
	(void)version;
	return stat(path, st);
}

EXPORT int __lxstat(int version, const char *path, struct stat *st)
{
	(void)version;
	return lstat(path, st);
}

EXPORT int __fxstatat(int version, int dirfd, const char *path, struct stat *st, int flags)
{
	(void)version;
	return fstatat(dirfd, path, st, flags);
}

ALSO(__fxstat64, __fxstat);
ALSO(__xstat64, __xstat);
ALSO(__lxstat64, __lxstat);
ALSO(__fxstatat64, __fxstatat);

EXPORT int statx(int dirfd, const char *path, int flags, unsigned mask, struct statx *stx)
{
	struct stat st;

	/* what our file is, fstatat() says; all else is the kernel's answer */
	if (!preload.active || fstatat(dirfd, path, &st, flags & ~AT_STATX_SYNC_TYPE) || !preload_is_shape(&st))
		return NEXT(statx)(dirfd, path, flags, mask, stx);
	*stx = (struct statx){
		.stx_mask = STATX_BASIC_STATS,
		.stx_blksize = (uint32_t)st.st_blksize,
		.stx_nlink = (uint32_t)st.st_nlink,
		.stx_uid = st.st_uid,
		.stx_gid = st.st_gid,
		.stx_mode = (uint16_t)st.st_mode,
		.stx_ino = st.st_ino,
		.stx_size = (uint64_t)st.st_size,
		.stx_blocks = (uint64_t)st.st_blocks,
		.stx_atime.tv_sec = st.st_atim.tv_sec,
		.stx_mtime.tv_sec = st.st_mtim.tv_sec,
		.stx_ctime.tv_sec = st.st_ctim.tv_sec,
		.stx_dev_major = major(st.st_dev),
		.stx_dev_minor = minor(st.st_dev),
	};
	return 0;
}
