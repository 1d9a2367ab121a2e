/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading and mapping a descriptor of the vmcore. */
#define _GNU_SOURCE
#include "preload.h"

#include <errno.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

/* Pieces that one mmap(2) may take: vm.max_map_count is 65530 by default, and is the collector's own too. */
enum { MAX_PIECES = 16384 };

static ssize_t read_at(off_t offset, void *buf, size_t n)
{
	int err = offset < 0 ? EINVAL : preload_ready();
	int64_t done = err ? -err : window_read(&preload.composer, (uint64_t)offset, buf, n < SSIZE_MAX ? n : SSIZE_MAX);

	if (done >= 0)
		return (ssize_t)done;
	errno = (int)-done;
	return -1;
}

/* Threads that share the descriptor get different bytes, as from the kernel: the offset is moved first. */
ssize_t preload_read_on(int fd, void *buf, size_t n)
{
	const uint64_t size = preload.composer.plan->size;
	off_t end = NEXT(lseek)(fd, 0, SEEK_CUR);
	ssize_t done;

	if (end < 0 || (uint64_t)end >= size || !n)
		return end < 0 ? -1 : 0;
	if (n > size)
		n = (size_t)size;
	end = NEXT(lseek)(fd, (off_t)n, SEEK_CUR);
	if (end < 0)
		return -1;
	done = read_at(end - (off_t)n, buf, n);
	if (done < (ssize_t)n)
		NEXT(lseek)(fd, (done < 0 ? 0 : done) - (off_t)n, SEEK_CUR);
	return done;
}

#define REFUSED(result) ((result) < 0 && errno == EBADF)

EXPORT ssize_t read(int fd, void *buf, size_t n)
{
	ssize_t done = NEXT(read)(fd, buf, n);

	return REFUSED(done) && preload_ours(fd) ? preload_read_on(fd, buf, n) : done;
}

EXPORT ssize_t pread(int fd, void *buf, size_t n, off_t offset)
{
	ssize_t done = NEXT(pread)(fd, buf, n, offset);

	return REFUSED(done) && preload_ours(fd) ? read_at(offset, buf, n) : done;
}

/* What _FORTIFY_SOURCE makes of them; libc's own ends the program where the buffer is too small. */
EXPORT ssize_t __read_chk(int fd, void *buf, size_t n, size_t room)
{
	return n > room ? NEXT(__read_chk)(fd, buf, n, room) : read(fd, buf, n);
}

EXPORT ssize_t __pread_chk(int fd, void *buf, size_t n, off_t offset, size_t room)
{
	return n > room ? NEXT(__pread_chk)(fd, buf, n, offset, room) : pread(fd, buf, n, offset);
}

ALSO(pread64, pread);
ALSO(__pread64_chk, __pread_chk);

/* One piece after the other, from `offset` or, where that is -1, from the descriptor's own. */
static ssize_t read_pieces(int fd, const struct iovec *pieces, int n, off_t offset)
{
	ssize_t sum = 0;

	for (int i = 0; i < n; i++) {
		ssize_t done = offset == -1 ? preload_read_on(fd, pieces[i].iov_base, pieces[i].iov_len)
					    : read_at(offset + sum, pieces[i].iov_base, pieces[i].iov_len);

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

	return REFUSED(done) && preload_ours(fd) ? read_pieces(fd, pieces, n, -1) : done;
}

EXPORT ssize_t preadv(int fd, const struct iovec *pieces, int n, off_t offset)
{
	ssize_t done = NEXT(preadv)(fd, pieces, n, offset);

	return REFUSED(done) && offset >= 0 && preload_ours(fd) ? read_pieces(fd, pieces, n, offset) : done;
}

EXPORT ssize_t preadv2(int fd, const struct iovec *pieces, int n, off_t offset, int flags)
{
	ssize_t done = NEXT(preadv2)(fd, pieces, n, offset, flags);

	return REFUSED(done) && offset >= -1 && preload_ours(fd) ? read_pieces(fd, pieces, n, offset) : done;
}

ALSO(preadv64, preadv);
ALSO(preadv64v2, preadv2);

EXPORT off_t lseek(int fd, off_t offset, int whence)
{
	if ((whence != SEEK_DATA && whence != SEEK_HOLE) || !preload_ours(fd))
		return NEXT(lseek)(fd, offset, whence);
	if (offset < 0 || offset >= (off_t)preload.composer.plan->size) {
		errno = ENXIO;
		return -1;
	}
	return NEXT(lseek)(fd, whence == SEEK_DATA ? offset : (off_t)preload.composer.plan->size, SEEK_SET);
}

ALSO(lseek64, lseek);

/* As mmap_vmcore() decides it. */
static void *map_vmcore(void *at, size_t n, int prot, int flags, off_t offset)
{
	const struct plan *plan = preload.composer.plan;
	uint64_t page = UINT64_C(1) << plan->page_shift, whole = (n + page - 1) & ~(page - 1);
	uint64_t size = (plan->size + page - 1) & ~(page - 1);
	int64_t laid = -preload_ready();

	if (laid)
		;	/* nothing may be read */
	else if (prot & (PROT_WRITE | PROT_EXEC))
		laid = -EPERM;
	else if (!n || offset < 0 || offset & (off_t)(page - 1) || whole < n || whole > size ||
		 (uint64_t)offset > size - whole)
		laid = -EINVAL;
	else
		laid = compose(&preload.composer, &at, (uint64_t)offset, whole, flags & (MAP_FIXED | MAP_FIXED_NOREPLACE),
			       MAX_PIECES, COMPOSE_ALL);
	if (laid >= 0)
		return at;
	errno = (int)-laid;
	return MAP_FAILED;
}

EXPORT void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
	void *map = NEXT(mmap)(at, n, prot, flags, fd, offset);

	if (map == MAP_FAILED && errno == EACCES && !(flags & MAP_ANONYMOUS) && preload_ours(fd))
		return map_vmcore(at, n, prot, flags, offset);
	if (map != MAP_FAILED && flags & MAP_FIXED && preload.active)
		compose_forget(map, n);
	return map;
}

ALSO(mmap64, mmap);

EXPORT int munmap(void *at, size_t n)
{
	if (preload.active)
		compose_forget(at, n);
	return NEXT(munmap)(at, n);
}

/* Programs that have the kernel copy go on with read() after this. */
static ssize_t copied(ssize_t done, int fd)
{
	if (REFUSED(done) && preload_ours(fd))
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
