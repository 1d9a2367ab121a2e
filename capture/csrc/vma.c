/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "vma.h"

#include <sys/ioctl.h>

#include "sys.h"

/* include/uapi/linux/fs.h, Linux 6.11 */
struct query {
	uint64_t size, flags, address;
	uint64_t start, end, vma_flags, page_size, offset, ino;
	uint32_t dev_major, dev_minor;
	uint32_t name_size, build_id_size;
	uint64_t name, build_id;
};

enum { READABLE = 1, WRITABLE = 2, EXECUTABLE = 4 };	/* of vma_flags */

#define QUERY _IOWR('f', 17, struct query)

int vma_query(int maps, uintptr_t address, struct vma *found)
{
	struct query q = { .size = sizeof(q), .address = address };

	if (ioctl(maps, QUERY, &q))
		return -errno;
	*found = (struct vma){
		.start = (uintptr_t)q.start, .end = (uintptr_t)q.end, .offset = q.offset,
		.dev = (uint64_t)q.dev_major << 32 | q.dev_minor, .ino = q.ino,
		.read_only = (q.vma_flags & (READABLE | WRITABLE | EXECUTABLE)) == READABLE,
	};
	return 0;
}

/* Bytes of the file, through a buffer that fits on the smallest signal stack. */
struct text {
	int fd;
	ssize_t got, at;
	char bytes[512];
};

/* The next character, 0 at the end. */
static char next(struct text *t)
{
	if (t->at >= t->got) {
		do
			t->got = sys_read(t->fd, t->bytes, sizeof(t->bytes));
		while (t->got < 0 && errno == EINTR);
		t->at = 0;
		if (t->got <= 0)
			return 0;
	}
	return t->bytes[t->at++];
}

/* A number; *end is the character behind it. */
static uint64_t number(struct text *t, unsigned base, char *end)
{
	uint64_t value = 0;

	for (;;) {
		char c = next(t);
		unsigned digit = c >= '0' && c <= '9' ? (unsigned)(c - '0') : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a') + 10 : 16;

		if (digit >= base) {
			*end = c;
			return value;
		}
		value = value * base + digit;
	}
}

/* start-end rwxp offset major:minor inode path */
bool vma_search(int maps, uintptr_t address, struct vma *found)
{
	struct text t = { .fd = maps };
	char c;

	do {
		found->start = (uintptr_t)number(&t, 16, &c);
		if (c != '-')
			return false;
		found->end = (uintptr_t)number(&t, 16, &c);
		found->read_only = next(&t) == 'r';
		found->read_only &= next(&t) == '-';
		found->read_only &= next(&t) == '-';
		do
			c = next(&t);
		while (c && c != ' ');
		found->offset = number(&t, 16, &c);
		found->dev = number(&t, 16, &c) << 32;
		found->dev |= number(&t, 16, &c);
		found->ino = number(&t, 10, &c);
		while (c && c != '\n')
			c = next(&t);
		if (found->start <= address && address < found->end)
			return true;
	} while (c);
	return false;
}

bool vma_at(uintptr_t address, struct vma *found)
{
	/* not "self": its main thread may have ended */
	int maps = sys_open("/proc/thread-self/maps", O_RDONLY | O_CLOEXEC), err;
	bool there;

	if (maps < 0)
		return false;
	err = vma_query(maps, address, found);
	there = err == -ENOTTY || err == -EINVAL ? vma_search(maps, address, found) : !err;
	sys_close(maps);
	return there;
}
