/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading and mapping a descriptor of the vmcore; see preload.h. */
#define _GNU_SOURCE
#include "preload.h"

#include <limits.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include "faults.h"

/* Pieces that one mmap(2) may take: vm.max_map_count is 65530 by default, and is the collector's own too. */
enum { MAX_PIECES = 16384 };

/*
 * Can the buffer be written? The kernel says so (EFAULT) where memcpy() would end the program. What it writes to each
 * page, the file's first bytes, is written over: these are pages that the read fills.
 */
static bool can_write(int fd, uint8_t *buf, size_t n)
{
	const uint8_t *const end = buf + n;
	const size_t page = (size_t)plan_page(&preload.composer);
	struct iovec pieces[64];

	while (buf < end) {
		int count = 0;

		while (buf < end && count < 64) {
			pieces[count++] = (struct iovec){ buf, 1 };
			buf = (uint8_t *)(((uintptr_t)buf | (page - 1)) + 1);
		}
		if (NEXT(preadv)(fd, pieces, count, 0) != count)
			return false;
	}
	return true;
}

/* As pread(2), of a descriptor that is ours: what the windows do not give, the kernel does. */
static ssize_t read_at(int fd, off_t offset, void *buf, size_t n)
{
	const uint64_t size = preload.composer.plan->size;
	size_t done = 0;
	ssize_t rest;

	if (offset < 0 || (uint64_t)offset >= size || n > SSIZE_MAX)
		return NEXT(pread)(fd, buf, n, offset);
	if (n > size - (uint64_t)offset)
		n = (size_t)(size - (uint64_t)offset);
	if (can_write(fd, buf, n))
		done = (size_t)window_read(&preload.composer, (uint64_t)offset, buf, n);
	if (done == n)
		return (ssize_t)n;
	rest = NEXT(pread)(fd, (uint8_t *)buf + done, n - done, offset + (off_t)done);
	return rest >= 0 ? (ssize_t)done + rest : done ? (ssize_t)done : rest;
}

/* One piece after the other. */
static ssize_t read_pieces(int fd, const struct iovec *pieces, int n, off_t offset)
{
	ssize_t sum = 0;

	for (int i = 0; i < n; i++) {
		ssize_t done = read_at(fd, offset + sum, pieces[i].iov_base, pieces[i].iov_len);

		if (done < 0)
			return sum ? sum : done;
		sum += done;
		if ((size_t)done < pieces[i].iov_len)
			break;
	}
	return sum;
}

/*
 * As readv(2). Who shares the descriptor gets different bytes, and all of one call's lie together, as from the kernel: the
 * offset is moved first, by all pieces at once.
 */
static ssize_t read_on(int fd, const struct iovec *pieces, int n)
{
	const uint64_t size = preload.composer.plan->size;
	off_t end = lseek(fd, 0, SEEK_CUR);
	uint64_t sum = 0;
	ssize_t done;

	for (int i = 0; i < n; i++)
		sum = pieces[i].iov_len < size - sum ? sum + pieces[i].iov_len : size;
	if (end < 0 || (uint64_t)end >= size || !sum)
		return NEXT(readv)(fd, pieces, n);
	end = lseek(fd, (off_t)sum, SEEK_CUR);
	if (end < 0)
		return -1;
	done = read_pieces(fd, pieces, n, end - (off_t)sum);
	if (done < (ssize_t)sum) {
		int saved = errno;

		lseek(fd, (done < 0 ? 0 : done) - (off_t)sum, SEEK_CUR);
		errno = saved;
	}
	return done;
}

static ssize_t read_one(int fd, void *buf, size_t n)
{
	const struct iovec piece = { buf, n };

	return read_on(fd, &piece, 1);
}

EXPORT ssize_t read(int fd, void *buf, size_t n)
{
	return n <= SSIZE_MAX && preload_ours(fd) ? read_one(fd, buf, n) : NEXT(read)(fd, buf, n);
}

EXPORT ssize_t pread(int fd, void *buf, size_t n, off_t offset)
{
	return preload_ours(fd) ? read_at(fd, offset, buf, n) : NEXT(pread)(fd, buf, n, offset);
}

/* What _FORTIFY_SOURCE makes of them; libc's own ends the program where the buffer is too small. */
ssize_t __read_chk(int fd, void *buf, size_t n, size_t room);
ssize_t __pread_chk(int fd, void *buf, size_t n, off_t offset, size_t room);

EXPORT ssize_t __read_chk(int fd, void *buf, size_t n, size_t room)
{
	return n <= room && n <= SSIZE_MAX && preload_ours(fd) ? read_one(fd, buf, n) : NEXT(__read_chk)(fd, buf, n, room);
}

EXPORT ssize_t __pread_chk(int fd, void *buf, size_t n, off_t offset, size_t room)
{
	return n <= room && preload_ours(fd) ? read_at(fd, offset, buf, n) : NEXT(__pread_chk)(fd, buf, n, offset, room);
}

ALSO(pread64, pread);
ALSO(__pread64_chk, __pread_chk);

/* Are the pieces what the kernel takes? It looks at all of them, also where nothing is to be read. */
static bool good_pieces(int fd, const struct iovec *pieces, int n)
{
	return n > 0 && n <= IOV_MAX && preload_ours(fd) &&
	       !NEXT(preadv)(fd, pieces, n, (off_t)preload.composer.plan->size);
}

EXPORT ssize_t readv(int fd, const struct iovec *pieces, int n)
{
	return good_pieces(fd, pieces, n) ? read_on(fd, pieces, n) : NEXT(readv)(fd, pieces, n);
}

EXPORT ssize_t preadv(int fd, const struct iovec *pieces, int n, off_t offset)
{
	return offset >= 0 && good_pieces(fd, pieces, n) ? read_pieces(fd, pieces, n, offset)
							 : NEXT(preadv)(fd, pieces, n, offset);
}

EXPORT ssize_t preadv2(int fd, const struct iovec *pieces, int n, off_t offset, int flags)
{
	if (!flags && offset >= -1 && good_pieces(fd, pieces, n))
		return offset >= 0 ? read_pieces(fd, pieces, n, offset) : read_on(fd, pieces, n);
	return NEXT(preadv2)(fd, pieces, n, offset, flags);
}

ALSO(preadv64, preadv);
ALSO(preadv64v2, preadv2);

/* What changes nothing about what is mapped. All else is the kernel's. */
enum { USUAL = MAP_SHARED | MAP_PRIVATE | MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_NORESERVE | MAP_POPULATE | MAP_DENYWRITE };

EXPORT void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
	const int fixed = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE), saved = errno;

	if (prot == PROT_READ && !(flags & ~USUAL) && preload_ours(fd)) {
		const uint64_t page = plan_page(&preload.composer), whole = (n + page - 1) & ~(page - 1);
		const uint64_t size = (preload.composer.plan->size + page - 1) & ~(page - 1);
		void *map = at;

		if (n && whole >= n && offset >= 0 && !((uint64_t)offset & (page - 1)) && whole <= size &&
		    (uint64_t)offset <= size - whole &&
		    compose(&preload.composer, &map, (uint64_t)offset, whole, fixed, MAX_PIECES, COMPOSE_ALL) >= 0)
			return map;
	}
	errno = saved;
	return NEXT(mmap)(at, n, prot, flags, fd, offset);
}

ALSO(mmap64, mmap);

/* A mapping of the vmcore never grows (VM_DONTEXPAND): behind it in an image lies what may be refused. */
EXPORT void *mremap(void *old, size_t n, size_t new_n, int flags, ...)
{
	void *to = NULL;
	va_list args;

	if (flags & MREMAP_FIXED) {
		va_start(args, flags);
		to = va_arg(args, void *);
		va_end(args);
	}
	if (new_n > n && preload.active && faults_of_vmcore(&preload.composer, (uintptr_t)old)) {
		errno = EFAULT;
		return MAP_FAILED;
	}
	return NEXT(mremap)(old, n, new_n, flags, to);
}
