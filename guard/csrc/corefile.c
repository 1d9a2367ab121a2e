/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "corefile.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

enum { TRIES = 50, PAUSE = 2000000 /* ns */ };

static int read_all(int fd, uint64_t offset, void *to, size_t n)
{
	uint8_t *at = to;

	while (n) {
		ssize_t got = pread(fd, at, n, (off_t)offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got ? -errno : -ENODATA;
		at += got;
		offset += (uint64_t)got;
		n -= (size_t)got;
	}
	return 0;
}

static int reopen(const struct corefile *c)
{
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", c->path_fd);
	do
		fd = open(path, O_RDONLY | O_CLOEXEC);
	while (fd < 0 && errno == EINTR);
	return fd < 0 ? -errno : fd;
}

/*
 * The notes of the dead kernel lie behind all that is ever added (dumps, program headers) and before memory, so they
 * move as memory does. And they move first (vmcoredd_update_size(): vmcoredd_orig_sz, then sizes, program headers, the
 * list's offsets, the file's size): what was read before they are seen in their place was in its place too.
 */
bool corefile_in_place(const struct corefile *c)
{
	uint8_t found[COREFILE_MARK];

	return !read_all(c->fd, c->mark_at + c->shift, found, c->mark_size) && !memcmp(found, c->mark, c->mark_size);
}

/*
 * Does the file reach so far? The kernel's own refuses to map what lies behind its end (mmap_vmcore()), and to map a page
 * touches nothing, as reading it would: it may be memory that is not there any more. Of any other file its size tells.
 */
static bool reaches(int fd, uint64_t end)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	struct statfs fs;
	struct statx st;	/* fstat() would be bound to glibc 2.33 and later */
	void *map;

	if (end > INT64_MAX)
		return false;
	if (fstatfs(fd, &fs) || fs.f_type != PROC_SUPER_MAGIC)
		return !statx(fd, "", AT_EMPTY_PATH, STATX_SIZE, &st) && st.stx_size >= end;
	map = mmap(NULL, page, PROT_READ, MAP_PRIVATE, fd, (off_t)((end - 1) & -page));
	if (map == MAP_FAILED)
		return false;
	munmap(map, page);
	return true;
}

/* 0 with `shift`, which the last program header to be changed tells, or -EAGAIN where some addition is under way. */
static int look(struct corefile *c)
{
	Elf64_Phdr load;

	if (read_all(c->fd, c->load_at, &load, sizeof(load)) || load.p_type != PT_LOAD ||
	    load.p_paddr != c->load_paddr || load.p_offset < c->load_offset)
		return -EAGAIN;
	c->shift = load.p_offset - c->load_offset;
	/* the size of the file changes last */
	if (c->shift && !reaches(c->fd, c->end + c->shift))
		return -EAGAIN;
	return corefile_in_place(c) ? 0 : -EAGAIN;
}

int corefile_settle(struct corefile *c)
{
	const struct timespec pause = { .tv_nsec = PAUSE };

	if (c->settled)
		return 0;
	if (c->fd < 0) {
		int fd = reopen(c);

		if (fd < 0)
			return fd;
		c->fd = fd;
	}
	for (int i = c->given_up ? TRIES : 1; look(c); i++) {
		c->given_up = i >= TRIES;
		if (c->given_up)
			return -ESTALE;
		nanosleep(&pause, NULL);	/* whoever adds something may need this very processor */
	}
	c->settled = true;
	c->given_up = false;
	return 0;
}

int corefile_read(struct corefile *c, uint64_t offset, void *to, size_t n)
{
	for (int i = 0; i < TRIES; i++) {
		int err = corefile_settle(c);

		if (err)
			return err;
		err = read_all(c->fd, offset + c->shift, to, n);
		if (corefile_in_place(c))
			return err;
		c->settled = false;
	}
	return -ESTALE;
}

void corefile_rest(struct corefile *c)
{
	if (c->fd >= 0)
		close(c->fd);
	c->fd = -1;
	c->settled = false;
}
