/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "guardfile.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sum64.h"

static const char magic[8] = "OLDMEMGD";

enum {
	BYTE_ORDER_MARK = 0x01020304,
	OTHER_ORDER_MARK = 0x04030201,
	MIN_PAGE_SHIFT = 12,
	MAX_PAGE_SHIFT = 16,
	DENY = 1,
	SUM_SIZE = 8,
	CHUNK = 16 << 10,	/* bytes that stay in the first-level cache between their sum and their check */
};

struct header {
	char magic[8];
	uint32_t order, version;
	uint64_t size;
	uint32_t page_shift, rules;
	uint64_t texts, texts_size;
	uint64_t zero[2];
};

struct entry {
	uint64_t first, end;
	uint64_t set_first, set_end, pages_per_bit, n, data;
	uint32_t name, name_size, reason, reason_size;
	uint32_t flags, zero;
};

static_assert(sizeof(struct header) == 64, "as docs/design.md has it");
static_assert(sizeof(struct entry) == 80, "as docs/design.md has it");

struct complaint {
	char *why;
	size_t room;
};

__attribute__((format(printf, 3, 4)))
static int complain(const struct complaint *to, int error, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(to->why, to->room, format, args);
	va_end(args);
	return -error;
}

static const struct header *header_of(const struct guardfile *f)
{
	return f->map;
}

static const struct entry *entries_of(const struct guardfile *f)
{
	return (const struct entry *)(header_of(f) + 1);
}

static const char *bytes_at(const struct guardfile *f, uint64_t offset)
{
	return (const char *)f->map + offset;
}

static uint64_t aligned(uint64_t offset)
{
	return (offset + GUARDFILE_ALIGN - 1) & ~(uint64_t)(GUARDFILE_ALIGN - 1);
}

/* Parts are padded with zeros: the same rules are the same bytes. */
static bool zeros(const struct guardfile *f, uint64_t from, uint64_t to)
{
	while (from < to)
		if (*bytes_at(f, from++))
			return false;
	return true;
}

/* Of a file of `size` bytes; where it is shorter than a header, zeros follow. */
static int check_header(const struct header *h, uint64_t size, const struct complaint *to)
{
	if (size < sizeof(magic) || memcmp(h->magic, magic, sizeof(magic)))
		return complain(to, EBADMSG, "is no compiled guard: it does not begin with %.8s", magic);
	if (size < sizeof(*h) + SUM_SIZE)
		return complain(to, EBADMSG, "ends at byte %#llx, within its header", (unsigned long long)size);
	if (h->order == OTHER_ORDER_MARK)
		return complain(to, EPROTONOSUPPORT, "was written on a machine of the other byte order");
	if (h->order != BYTE_ORDER_MARK)
		return complain(to, EBADMSG, "byte order mark at 0x8 is %#x, not %#x", h->order, BYTE_ORDER_MARK);
	if (h->version != GUARDFILE_VERSION)
		return complain(to, EPROTONOSUPPORT, "is of version %u; version %d is understood", h->version,
				GUARDFILE_VERSION);
	if (h->size != size)
		return complain(to, EBADMSG, "has %#llx bytes where its header says %#llx",
				(unsigned long long)size, (unsigned long long)h->size);
	if (h->page_shift < MIN_PAGE_SHIFT || h->page_shift > MAX_PAGE_SHIFT)
		return complain(to, EBADMSG, "page shift at 0x18 is %u, not %d to %d", h->page_shift, MIN_PAGE_SHIFT,
				MAX_PAGE_SHIFT);
	if (h->rules > GUARDFILE_MAX_RULES)
		return complain(to, EBADMSG, "has %u rules at 0x1c; up to %d are understood", h->rules,
				GUARDFILE_MAX_RULES);
	if (h->zero[0] || h->zero[1])
		return complain(to, EBADMSG, "reserved bytes at 0x30 are not zero");
	if (size % GUARDFILE_ALIGN != SUM_SIZE)
		return complain(to, EBADMSG, "has %#llx bytes, not a multiple of %d and %d more",
				(unsigned long long)size, GUARDFILE_ALIGN, SUM_SIZE);
	return 0;
}

/* One text of rule i, which must begin at *at and is passed over. */
static int check_text(const struct guardfile *f, size_t i, uint32_t offset, uint32_t size, uint64_t *at, uint64_t end,
		      const struct complaint *to)
{
	if (offset != *at || size >= end - *at)
		return complain(to, EBADMSG, "rule %zu: text of %#x bytes at %#x does not lie where it belongs, at %#llx",
				i, size, offset, (unsigned long long)*at);
	for (uint32_t k = 0; k < size; k++) {
		unsigned char c = (unsigned char)*bytes_at(f, offset + k);

		if (c < ' ' || c == 0x7f)
			return complain(to, EBADMSG, "rule %zu: text at %#x has the control character %#x", i, offset, c);
	}
	if (*bytes_at(f, (uint64_t)offset + size))
		return complain(to, EBADMSG, "rule %zu: text at %#x does not end with a NUL", i, offset);
	*at += (uint64_t)size + 1;
	return 0;
}

static uint64_t array_size(const struct entry *e)
{
	return e->pages_per_bit ? (e->n / 64 + !!(e->n % 64)) * 8 : e->n * 16;
}

/* All of rule i but its array, which must begin at *at and is passed over. */
static int check_entry(const struct guardfile *f, size_t i, uint64_t *at, const struct complaint *to)
{
	const struct entry *e = &entries_of(f)[i];
	uint64_t last = UINT64_C(1) << (64 - f->page_shift), room = f->size - SUM_SIZE - *at;
	uint64_t most = e->pages_per_bit ? room * 8 : room / 16, pages;

	if ((e->flags & ~(uint32_t)DENY) || e->zero)
		return complain(to, EBADMSG, "rule %zu: unknown flags %#x, or reserved bytes that are not zero", i,
				e->flags);
	if (e->first > e->end || e->end > last || e->set_first > e->set_end || e->set_end > last)
		return complain(to, EBADMSG, "rule %zu: pfns [%#llx, %#llx) or [%#llx, %#llx) are not possible", i,
				(unsigned long long)e->first, (unsigned long long)e->end,
				(unsigned long long)e->set_first, (unsigned long long)e->set_end);
	if (e->n > most || e->data != *at || array_size(e) > room)
		return complain(to, EBADMSG, "rule %zu: array of %#llx at %#llx does not lie where it belongs, at %#llx", i,
				(unsigned long long)e->n, (unsigned long long)e->data, (unsigned long long)*at);
	if (e->pages_per_bit && (__builtin_mul_overflow(e->n, e->pages_per_bit, &pages) ||
				 pages != e->set_end - e->set_first))
		return complain(to, EBADMSG, "rule %zu: %#llx bits of %#llx pages are not the pfns [%#llx, %#llx)", i,
				(unsigned long long)e->n, (unsigned long long)e->pages_per_bit,
				(unsigned long long)e->set_first, (unsigned long long)e->set_end);
	*at = aligned(*at + array_size(e));
	if (!zeros(f, e->data + array_size(e), *at))
		return complain(to, EBADMSG, "rule %zu: bytes behind its array are not zero", i);
	return 0;
}

/* Where everything lies: what the gate relies on, but for what is in the arrays. */
static int check_layout(const struct guardfile *f, uint64_t *arrays, const struct complaint *to)
{
	const struct header *h = header_of(f);
	uint64_t end = f->size - SUM_SIZE, at = sizeof(*h) + f->n * sizeof(struct entry), texts_end;
	int err = 0;

	if (at > end || h->texts != at || h->texts_size > end - at)
		return complain(to, EBADMSG, "%zu rules and %#llx bytes of texts at %#llx do not fit", f->n,
				(unsigned long long)h->texts_size, (unsigned long long)h->texts);
	texts_end = at + h->texts_size;
	for (size_t i = 0; i < f->n && !err; i++) {
		const struct entry *e = &entries_of(f)[i];

		err = check_text(f, i, e->name, e->name_size, &at, texts_end, to);
		if (!err)
			err = check_text(f, i, e->reason, e->reason_size, &at, texts_end, to);
	}
	if (err)
		return err;
	*arrays = aligned(at);
	if (at != texts_end || !zeros(f, at, *arrays))
		return complain(to, EBADMSG, "bytes at %#llx, behind the texts, belong to nothing", (unsigned long long)at);
	at = *arrays;
	for (size_t i = 0; i < f->n && !err; i++)
		err = check_entry(f, i, &at, to);
	if (!err && at != end)
		return complain(to, EBADMSG, "bytes at %#llx, behind the arrays, belong to nothing", (unsigned long long)at);
	return err;
}

/* Runs ascend, touch neither each other nor lie outside of the set. *lowest is where the next one may begin. */
static bool runs_ascend(const uint64_t *data, uint64_t n, uint64_t set_end, uint64_t *lowest)
{
	uint64_t low = *lowest;
	bool wrong = false;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t start = data[2 * i], end = data[2 * i + 1];

		wrong |= (start < low) | (start >= end) | (end > set_end);
		low = end + 1;
	}
	*lowest = low;
	return !wrong;
}

/* Sum and contents in one pass, for it is memory that takes the time. */
static int check_array(const struct guardfile *f, size_t i, uint64_t next, struct sum64 *sum,
		       const struct complaint *to)
{
	const struct entry *e = &entries_of(f)[i];
	uint64_t lowest = e->set_first, end = e->data + array_size(e);

	for (uint64_t at = e->data; at < next; at += CHUNK) {
		const uint64_t *words = (const uint64_t *)bytes_at(f, at);
		uint64_t runs = at < end ? ((end - at < CHUNK ? end - at : CHUNK) / 16) : 0;

		sum64_add(sum, words, next - at < CHUNK ? next - at : CHUNK);
		if (!e->pages_per_bit && !runs_ascend(words, runs, e->set_end, &lowest))
			return complain(to, EBADMSG, "rule %zu: runs at %#llx do not ascend in [%#llx, %#llx)", i,
					(unsigned long long)at, (unsigned long long)e->set_first,
					(unsigned long long)e->set_end);
	}
	if (e->pages_per_bit && e->n % 64 && ((const uint64_t *)bytes_at(f, e->data))[e->n / 64] >> e->n % 64)
		return complain(to, EBADMSG, "rule %zu: bits behind the last of its bitmap are set", i);
	return 0;
}

int guardfile_check(struct guardfile *f, const void *map, uint64_t size, char *why, size_t room)
{
	const struct complaint to = { why, room };
	uint64_t arrays = 0, end = size - SUM_SIZE, found;
	struct header header = { .order = 0 };
	struct sum64 sum;
	int err;

	*f = (struct guardfile){ .map = map, .size = size };
	memcpy(&header, map, size < sizeof(header) ? (size_t)size : sizeof(header));
	err = check_header(&header, size, &to);
	if (err)
		return err;
	f->page_shift = header.page_shift;
	f->n = header.rules;
	err = check_layout(f, &arrays, &to);
	if (err)
		return err;
	sum64_begin(&sum);
	sum64_add(&sum, map, arrays);
	for (size_t i = 0; i < f->n && !err; i++)
		err = check_array(f, i, i + 1 < f->n ? entries_of(f)[i + 1].data : end, &sum, &to);
	if (err)
		return err;
	memcpy(&found, bytes_at(f, end), sizeof(found));
	if (found != sum64_end(&sum))
		return complain(&to, EBADMSG, "is damaged: its checksum is %#llx where it says %#llx",
				(unsigned long long)sum64_end(&sum), (unsigned long long)found);
	return 0;
}

/* The file's header as it is now: most of what is no guard file, whatever its size, is known by that alone. */
static int look_at_header(int fd, uint64_t size, const struct complaint *to)
{
	struct header header = { .order = 0 };
	ssize_t got;

	do
		got = pread(fd, &header, sizeof(header), 0);
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return complain(to, errno, "cannot be read: %s", strerror(errno));
	return check_header(&header, size, to);
}

int guardfile_open(struct guardfile *f, const char *path, char *why, size_t room)
{
	const struct complaint to = { why, room };
	/* whoever opens a FIFO without O_NONBLOCK waits for its writer */
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY), err;
	struct statx st;	/* fstat() would be bound to glibc 2.33 and later */
	void *map;

	*f = (struct guardfile){ .map = NULL };
	if (fd < 0 || statx(fd, "", AT_EMPTY_PATH, STATX_TYPE | STATX_SIZE, &st)) {
		err = errno;
		if (fd >= 0)
			close(fd);
		return complain(&to, err, "%s", strerror(err));
	}
	if (!S_ISREG(st.stx_mode) || !st.stx_size) {
		close(fd);
		return complain(&to, EBADMSG, "is no compiled guard: it is %s",
				S_ISREG(st.stx_mode) ? "empty" : "no regular file");
	}
	err = look_at_header(fd, st.stx_size, &to);
	if (err) {
		close(fd);
		return err;
	}
	/* all of it, for all of it is checked; the header once more too */
	map = mmap(NULL, (size_t)st.stx_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
	err = errno;
	close(fd);
	if (map == MAP_FAILED)
		return complain(&to, err, "cannot be mapped: %s", strerror(err));
	err = guardfile_check(f, map, st.stx_size, why, room);
	if (err)
		guardfile_close(f);
	return err;
}

void guardfile_close(struct guardfile *f)
{
	if (f->map)
		munmap((void *)f->map, f->size);
	f->map = NULL;
}

void guardfile_rule(const struct guardfile *f, size_t i, struct gate_rule *rule, const char **name,
		    const char **reason)
{
	const struct entry *e = &entries_of(f)[i];

	if (name)
		*name = bytes_at(f, e->name);
	if (reason)
		*reason = bytes_at(f, e->reason);
	if (!rule)
		return;
	*rule = (struct gate_rule){
		.first = e->first,
		.end = e->end,
		.set = {
			.first = e->set_first,
			.end = e->set_end,
			.pages_per_bit = e->pages_per_bit,
			.n = e->n,
			.data = (const uint64_t *)bytes_at(f, e->data),
		},
		.deny = e->flags & DENY,
	};
}

uint64_t guardfile_sum(const void *bytes, uint64_t n)
{
	struct sum64 sum;

	sum64_begin(&sum);
	sum64_add(&sum, bytes, n);
	return sum64_end(&sum);
}
