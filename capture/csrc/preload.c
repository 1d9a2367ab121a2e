/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What "oldmem run" puts in front of libc in a collector (LD_PRELOAD): the vmcore is opened, read and mapped inside of
 * the collector's own process.
 *
 * The descriptor that a program gets is one of an empty file as large as the vmcore, opened for writing only and sealed
 * against it. So the kernel itself keeps size, offset, dup(2), close(2) and inheritance; what it cannot answer rightly
 * it refuses (EBADF to read, EACCES to mmap), and only then do we look whether it is ours. Other files cost nothing, a
 * call that is not known here fails instead of reading zeros, and nothing about descriptors is remembered.
 */
#define _GNU_SOURCE
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
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include "window.h"

#if __SIZEOF_LONG__ != 8
#error "made for file offsets of 64 bits"
#endif

#define PLAN_VARIABLE "OLDMEM_RUN"
#define EXPORT __attribute__((visibility("default")))
/* On these machines a file offset has 64 bits under either name. */
#define ALSO(name, alias_of) \
	EXPORT extern __typeof__(alias_of) name __attribute__((alias(#alias_of)))

/* Pieces that one mmap(2) may take: vm.max_map_count is 65530 by default, and is the collector's own too. */
enum { MAX_PIECES = 16384, OPENING = O_CREAT | O_TRUNC | O_ACCMODE };

/* The next definition of a function, looked up once; threads that look at once find the same. */
static void *next_of(void **cache, const char *name)
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

#define NEXT(name) \
	({ \
		static void *cache; \
		(__typeof__(name) *)next_of(&cache, #name); \
	})

static struct libc libc;
static struct composer composer;
static bool active;	/* set before main() */
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

	if (!path || active)
		return;
	libc = (struct libc){ NEXT(open), NEXT(close), NEXT(mmap), NEXT(munmap) };
	if (compose_open(&composer, &libc, path, why, sizeof(why))) {
		/* which file is to be guarded is not known: nothing may be read */
		give_up(why);
		_exit(1);
	}
	active = true;
}

static void make_ready(void)
{
	char why[256];

	not_ready = -compose_ready(&composer, why, sizeof(why));
	if (not_ready)
		give_up(why);
}

/* 0, or errno. */
static int ready(void)
{
	pthread_once(&once, make_ready);
	return not_ready;
}

static bool is_target(const struct stat *st)
{
	return composer.plan->ino && st->st_ino == composer.plan->ino && st->st_dev == composer.plan->dev;
}

static bool is_shape(const struct stat *st)
{
	return st->st_ino == composer.plan->shape_ino && st->st_dev == composer.plan->shape_dev;
}

/* Is the descriptor one of ours? errno stays as it is. */
static bool ours(int fd)
{
	struct stat st;
	int saved = errno;
	bool found = active && !NEXT(fstat)(fd, &st) && is_shape(&st);

	errno = saved;
	return found;
}

/* Where no file has the name of the vmcore, a path that did not lead to one may mean it. */
static bool named(int dirfd, const char *path)
{
	char here[PATH_MAX];
	int saved = errno;
	bool same = false;

	if (!active || composer.plan->ino || errno != ENOENT || !path)
		return false;
	if (path[0] == '/') {
		same = !strcmp(path, composer.plan->name);
	} else if (dirfd == AT_FDCWD && getcwd(here, sizeof(here))) {
		size_t n = strlen(here);

		same = !strncmp(here, composer.plan->name, n) && composer.plan->name[n] == '/' &&
		       !strcmp(composer.plan->name + n + 1, path);
	}
	errno = saved;
	return same;
}

/* The kernel's own vmcore is hidden below a socket, which cannot be opened. errno stays as it is. */
static bool covered(int dirfd, const char *path)
{
	struct stat st;
	bool found;

	if (!active || errno != ENXIO || !path)
		return false;
	found = !NEXT(fstatat)(dirfd, path, &st, 0) && is_target(&st);
	errno = ENXIO;
	return found;
}

static int open_shape(int flags)
{
	int err, fd;

	if (flags & OPENING & ~O_CREAT) {
		errno = EACCES;
		return -1;
	}
	err = ready();
	fd = err ? -err : compose_reopen(&composer, composer.plan->shape_fd, O_WRONLY);
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

	if (!active)
		return fd;
	if (fd < 0)
		return named(dirfd, path) || covered(dirfd, path) ? open_shape(flags) : fd;
	if (!composer.plan->ino || flags & O_PATH || NEXT(fstat)(fd, &st) || !is_target(&st))
		return fd;
	NEXT(close)(fd);
	return open_shape(flags);
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

/* The answer to some stat() of `path`, with the vmcore's own in place of what stands for it. */
static int told(int result, int dirfd, const char *path, struct stat *st)
{
	int fd;

	if (!active)
		return result;
	if (result ? !named(dirfd, path) : !is_target(st) && !is_shape(st))
		return result;
	if (result || is_target(st)) {
		fd = compose_reopen(&composer, composer.plan->shape_fd, O_WRONLY);
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
	if (!active || fstatat(dirfd, path, &st, flags & ~AT_STATX_SYNC_TYPE) || !is_shape(&st))
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

static ssize_t read_at(uint64_t offset, void *buf, size_t n)
{
	int64_t done = window_read(&composer, offset, buf, n < SSIZE_MAX ? n : SSIZE_MAX);

	if (done >= 0)
		return (ssize_t)done;
	errno = (int)-done;
	return -1;
}

static ssize_t read_at_any(off_t offset, void *buf, size_t n)
{
	if (offset >= 0)
		return read_at((uint64_t)offset, buf, n);
	errno = EINVAL;
	return -1;
}

/* Threads that share the descriptor get different bytes, as from the kernel: the offset is moved first. */
static ssize_t read_on(int fd, void *buf, size_t n)
{
	off_t end, size = (off_t)composer.plan->size;
	ssize_t done;

	if (n > (size_t)(SSIZE_MAX / 2))
		n = (size_t)(SSIZE_MAX / 2);
	end = NEXT(lseek)(fd, 0, SEEK_CUR);
	if (end < 0 || end >= size || !n)
		return end < 0 ? -1 : 0;
	if (n > composer.plan->size)
		n = (size_t)composer.plan->size;
	end = NEXT(lseek)(fd, (off_t)n, SEEK_CUR);
	if (end < 0)
		return -1;
	done = read_at((uint64_t)end - n, buf, n);
	if (done < (ssize_t)n)
		NEXT(lseek)(fd, (done < 0 ? 0 : done) - (off_t)n, SEEK_CUR);
	return done;
}

#define REFUSED(result) ((result) < 0 && errno == EBADF)

EXPORT ssize_t read(int fd, void *buf, size_t n)
{
	ssize_t done = NEXT(read)(fd, buf, n);

	return REFUSED(done) && ours(fd) ? read_on(fd, buf, n) : done;
}

EXPORT ssize_t pread(int fd, void *buf, size_t n, off_t offset)
{
	ssize_t done = NEXT(pread)(fd, buf, n, offset);

	return REFUSED(done) && ours(fd) ? read_at_any(offset, buf, n) : done;
}

static size_t fits(size_t n, size_t room)
{
	if (n > room) {
		static const char why[] = "oldmem run: a read larger than its buffer\n";

		if (write(2, why, sizeof(why) - 1) < 0)
			abort();
		abort();
	}
	return n;
}

/* What _FORTIFY_SOURCE makes of them. */
EXPORT ssize_t __read_chk(int fd, void *buf, size_t n, size_t room)
{
	return read(fd, buf, fits(n, room));
}

EXPORT ssize_t __pread_chk(int fd, void *buf, size_t n, off_t offset, size_t room)
{
	return pread(fd, buf, fits(n, room), offset);
}

ALSO(pread64, pread);
ALSO(__pread64_chk, __pread_chk);

/* One piece after the other, from `offset` or, where that is -1, from the descriptor's own. */
static ssize_t read_pieces(int fd, const struct iovec *pieces, int n, off_t offset)
{
	ssize_t sum = 0;

	for (int i = 0; i < n; i++) {
		ssize_t done = offset == -1 ? read_on(fd, pieces[i].iov_base, pieces[i].iov_len)
					    : read_at_any(offset + sum, pieces[i].iov_base, pieces[i].iov_len);

		if (done < 0)
			return sum ? sum : done;
		sum += done;
		if ((size_t)done < pieces[i].iov_len)
			break;
	}
	return sum;
}

EXPORT ssize_t readv(int fd, const struct iovec *pieces, int n)
{
	ssize_t done = NEXT(readv)(fd, pieces, n);

	return REFUSED(done) && ours(fd) ? read_pieces(fd, pieces, n, -1) : done;
}

EXPORT ssize_t preadv(int fd, const struct iovec *pieces, int n, off_t offset)
{
	ssize_t done = NEXT(preadv)(fd, pieces, n, offset);

	return REFUSED(done) && offset >= 0 && ours(fd) ? read_pieces(fd, pieces, n, offset) : done;
}

EXPORT ssize_t preadv2(int fd, const struct iovec *pieces, int n, off_t offset, int flags)
{
	ssize_t done = NEXT(preadv2)(fd, pieces, n, offset, flags);

	return REFUSED(done) && offset >= -1 && ours(fd) ? read_pieces(fd, pieces, n, offset) : done;
}

ALSO(preadv64, preadv);
ALSO(preadv64v2, preadv2);

EXPORT off_t lseek(int fd, off_t offset, int whence)
{
	if ((whence != SEEK_DATA && whence != SEEK_HOLE) || !ours(fd))
		return NEXT(lseek)(fd, offset, whence);
	if (offset < 0 || offset >= (off_t)composer.plan->size) {
		errno = ENXIO;
		return -1;
	}
	return NEXT(lseek)(fd, whence == SEEK_DATA ? offset : (off_t)composer.plan->size, SEEK_SET);
}

ALSO(lseek64, lseek);

/* As mmap_vmcore() decides it. */
static void *map_vmcore(void *at, size_t n, int prot, int flags, off_t offset)
{
	uint64_t page = UINT64_C(1) << composer.plan->page_shift, whole = (n + page - 1) & ~(page - 1);
	uint64_t size = (composer.plan->size + page - 1) & ~(page - 1);
	int64_t laid;

	if (prot & (PROT_WRITE | PROT_EXEC))
		laid = -EPERM;
	else if (!n || offset < 0 || offset & (off_t)(page - 1) || whole < n || whole > size ||
		 (uint64_t)offset > size - whole)
		laid = -EINVAL;
	else
		laid = compose(&composer, &at, (uint64_t)offset, whole, flags & (MAP_FIXED | MAP_FIXED_NOREPLACE),
			       MAX_PIECES, COMPOSE_ALL);
	if (laid >= 0)
		return at;
	errno = (int)-laid;
	return MAP_FAILED;
}

EXPORT void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
	void *map = NEXT(mmap)(at, n, prot, flags, fd, offset);

	if (map == MAP_FAILED && errno == EACCES && !(flags & MAP_ANONYMOUS) && ours(fd))
		return map_vmcore(at, n, prot, flags, offset);
	if (map != MAP_FAILED && flags & MAP_FIXED && active)
		compose_forget(map, n);
	return map;
}

ALSO(mmap64, mmap);

EXPORT int munmap(void *at, size_t n)
{
	if (active)
		compose_forget(at, n);
	return NEXT(munmap)(at, n);
}

/* Programs that have the kernel copy go on with read() after this. */
static ssize_t copied(ssize_t done, int fd)
{
	if (REFUSED(done) && ours(fd))
		errno = EINVAL;
	return done;
}

EXPORT ssize_t copy_file_range(int in, off_t *in_offset, int out, off_t *out_offset, size_t n, unsigned flags)
{
	return copied(NEXT(copy_file_range)(in, in_offset, out, out_offset, n, flags), in);
}

EXPORT ssize_t sendfile(int out, int in, off_t *offset, size_t n)
{
	return copied(NEXT(sendfile)(out, in, offset, n), in);
}

ALSO(sendfile64, sendfile);

EXPORT ssize_t splice(int in, off_t *in_offset, int out, off_t *out_offset, size_t n, unsigned flags)
{
	return copied(NEXT(splice)(in, in_offset, out, out_offset, n, flags), in);
}

/* stdio calls the kernel by itself: it gets a stream of ours. */
static ssize_t stream_read(void *cookie, char *buf, size_t n)
{
	return read_on((int)(intptr_t)cookie, buf, n);
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

	if (!active || *mode != 'r' || strchr(mode, '+') || stat(path, &st) || !is_shape(&st))
		return NEXT(fopen)(path, mode);
	fd = open_shape(strchr(mode, 'e') ? O_CLOEXEC : 0);
	if (fd < 0)
		return NULL;
	file = fopencookie((void *)(intptr_t)fd, "r", io);
	if (!file)
		NEXT(close)(fd);
	return file;
}

ALSO(fopen64, fopen);
