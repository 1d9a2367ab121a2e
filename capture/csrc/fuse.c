/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* linux/fuse.h of 7.39 (Linux 6.6) on has it; kernels that do not know the bit do not offer it */
#ifndef FUSE_DIRECT_IO_ALLOW_MMAP
#define FUSE_DIRECT_IO_ALLOW_MMAP (UINT64_C(1) << 36)
#endif

/*
 * Some ms after the last request the kernel's own vmcore is closed again, if it was opened: opening it for each request
 * would double the time that small ones take. It is meanwhile as it is with any reader of that file.
 */
enum { FOREVER = 3600, LINGER = 10 };

/* So many processes may end over one request before its reader gets an error, and all others are served on. */
enum { MOST_TRIES = 3 };

_Static_assert(FUSE_REQUEST_SIZE >= FUSE_MIN_READ_BUFFER, "the kernel refuses to fill a smaller one");

static int reply(const struct fuse_server *s, uint64_t unique, int error, const void *body, size_t size)
{
	struct fuse_out_header h = { .len = (uint32_t)(sizeof(h) + size), .error = error, .unique = unique };
	struct iovec v[2] = { { &h, sizeof(h) }, { (void *)body, size } };

	/* ENOENT: the request was interrupted and is gone; that is the kernel's business */
	if (writev(s->fd, v, size ? 2 : 1) < 0 && errno != ENOENT)
		return -errno;
	return 0;
}

static uint64_t node_size(const struct fuse_server *s, const struct fuse_node *node)
{
	off_t end;

	switch (node->kind) {
	case FUSE_NODE_FOLDER:
		return 0;
	case FUSE_NODE_TEXT:
		end = lseek(node->text_fd, 0, SEEK_END);	/* its offset is used for nothing else */
		return end < 0 ? 0 : (uint64_t)end;
	default:
		return s->view->size;
	}
}

static struct fuse_attr attr_of(const struct fuse_server *s, size_t i)
{
	const struct fuse_node *node = &s->nodes[i];
	uint64_t size = node_size(s, node), time = (uint64_t)s->time;
	bool folder = node->kind == FUSE_NODE_FOLDER;

	return (struct fuse_attr){
		.ino = i + 1, .size = size, .blocks = (size + 511) / 512, .blksize = 4096,
		.atime = time, .mtime = time, .ctime = time,
		.mode = folder ? S_IFDIR | 0500 : S_IFREG | 0400, .nlink = folder ? 2 : 1,
	};
}

/*
 * Each look at a text's name asks for it anew: it is made then, so that the size which the kernel knows at open is the
 * size of what is read (sendfile(2) stops there even under FOPEN_DIRECT_IO). Everything else never changes.
 */
static uint64_t lifetime(const struct fuse_node *node)
{
	return node->kind == FUSE_NODE_TEXT ? 0 : FOREVER;
}

static int do_init(const struct fuse_server *s, uint64_t unique, const struct fuse_init_in *in)
{
	uint64_t offered = in->flags, flags = FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_INIT_EXT | FUSE_DIRECT_IO_ALLOW_MMAP;
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_readahead = s->max_read,
		.max_background = 16, .congestion_threshold = 12, .max_write = 4096, .time_gran = 1,
		.max_pages = (uint16_t)(s->max_read / 4096),
	};

	if (in->major < 7)
		return reply(s, unique, -EPROTO, NULL, 0);
	if (in->major == 7 && in->minor < out.minor)
		out.minor = in->minor;
	if (offered & FUSE_INIT_EXT)
		offered |= (uint64_t)in->flags2 << 32;
	flags &= offered;
	out.flags = (uint32_t)flags;
	out.flags2 = (uint32_t)(flags >> 32);
	return reply(s, unique, 0, &out, sizeof(out));
}

/* Index of the file of that name, 0 (the folder itself) if there is none. */
static size_t find_name(const struct fuse_server *s, const char *name, size_t room)
{
	if (strnlen(name, room) == room)
		return 0;
	for (size_t i = 1; i < s->n; i++)
		if (!strcmp(name, s->nodes[i].name))
			return i;
	return 0;
}

static int reply_entry(const struct fuse_server *s, uint64_t unique, size_t node)
{
	struct fuse_entry_out out = {
		.nodeid = node + 1, .entry_valid = lifetime(&s->nodes[node]), .attr_valid = lifetime(&s->nodes[node]),
		.attr = attr_of(s, node),
	};

	return reply(s, unique, 0, &out, sizeof(out));
}

static int do_getattr(const struct fuse_server *s, uint64_t unique, size_t node)
{
	struct fuse_attr_out out = { .attr_valid = lifetime(&s->nodes[node]), .attr = attr_of(s, node) };

	return reply(s, unique, 0, &out, sizeof(out));
}

static int do_readdir(const struct fuse_server *s, uint64_t unique, const struct fuse_read_in *in)
{
	uint8_t *end = s->buffer;
	size_t room = in->size < s->max_read ? in->size : s->max_read;

	for (size_t i = in->offset + 1; i < s->n; i++) {
		struct fuse_dirent entry = {
			.ino = i + 1, .off = i, .type = S_IFREG >> 12, .namelen = (uint32_t)strlen(s->nodes[i].name),
		};
		size_t size = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + entry.namelen);

		if ((size_t)(end - s->buffer) + size > room)
			break;
		memset(end, 0, size);
		memcpy(end, &entry, FUSE_NAME_OFFSET);
		memcpy(end + FUSE_NAME_OFFSET, s->nodes[i].name, entry.namelen);
		end += size;
	}
	return reply(s, unique, 0, s->buffer, (size_t)(end - s->buffer));
}

static int do_open(const struct fuse_server *s, uint64_t unique, size_t node, const struct fuse_open_in *in)
{
	static const uint32_t flags[] = {
		[FUSE_NODE_CACHED] = FOPEN_KEEP_CACHE,
		[FUSE_NODE_DIRECT] = FOPEN_DIRECT_IO,
		[FUSE_NODE_TEXT] = 0,	/* cached, and the cache dropped at each open */
	};
	struct fuse_open_out out = { .open_flags = flags[s->nodes[node].kind] };

	if ((in->flags & O_ACCMODE) != O_RDONLY)
		return reply(s, unique, -EROFS, NULL, 0);
	return reply(s, unique, 0, &out, sizeof(out));
}

static int do_read(const struct fuse_server *s, uint64_t unique, size_t node, const struct fuse_read_in *in)
{
	const struct fuse_node *what = &s->nodes[node];
	size_t size = in->size < s->max_read ? in->size : s->max_read;

	if (what->kind == FUSE_NODE_FOLDER)
		return reply(s, unique, -EISDIR, NULL, 0);
	if (what->kind == FUSE_NODE_TEXT) {
		ssize_t got = pread(what->text_fd, s->buffer, size, (off_t)in->offset);

		return reply(s, unique, got < 0 ? -errno : 0, s->buffer, got < 0 ? 0 : (size_t)got);
	}
	size = view_read(s->view, in->offset, s->buffer, size);
	return reply(s, unique, 0, s->buffer, size);
}

static int do_statfs(const struct fuse_server *s, uint64_t unique)
{
	struct fuse_statfs_out out = {
		.st = { .blocks = s->view->size / 4096, .files = s->n, .bsize = 4096, .frsize = 4096, .namelen = 23 },
	};

	return reply(s, unique, 0, &out, sizeof(out));
}

/* ms until the deadline: 0 if it has come, -1 if there is none. */
static int until_deadline(const struct fuse_server *s)
{
	struct timespec t;
	uint64_t now;

	if (!s->deadline)
		return -1;
	clock_gettime(CLOCK_MONOTONIC, &t);
	now = (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
	return now < s->deadline ? (int)((s->deadline - now) / 1000000) + 1 : 0;
}

/*
 * Wait for a request: 0, FUSE_SERVE_WOKEN or -errno. A signal that comes while an earlier request is being served would
 * not interrupt what follows it, and the caller would never see it: so its handler also makes a watched descriptor
 * readable.
 */
static int await_request(const struct fuse_server *s)
{
	struct pollfd wanted[1 + FUSE_WATCHED] = { { .fd = s->fd, .events = POLLIN } };
	int left = until_deadline(s), ready;
	nfds_t n = 1;

	if (!left)
		return FUSE_SERVE_WOKEN;
	for (int i = 0; i < FUSE_WATCHED; i++)
		if (s->watch[i] >= 0)
			wanted[n++] = (struct pollfd){ .fd = s->watch[i], .events = POLLIN };
	ready = physmem_at_rest(s->view->mem) ? 0 : poll(wanted, n, LINGER);
	if (!ready) {
		physmem_rest(s->view->mem);
		ready = poll(wanted, n, left);
	}
	if (ready < 0)
		return -errno;
	while (--n)
		if (wanted[n].revents)
			return FUSE_SERVE_WOKEN;
	return ready ? 0 : FUSE_SERVE_WOKEN;
}

/* Bytes that the operation's argument must at least have; what is not listed takes none. */
static size_t argument_size(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_INIT:
		return offsetof(struct fuse_init_in, flags2);
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		return sizeof(struct fuse_open_in);
	case FUSE_READ:
	case FUSE_READDIR:
		return sizeof(struct fuse_read_in);
	case FUSE_LOOKUP:
		return 1;
	default:
		return 0;
	}
}

static int do_lookup(struct fuse_server *s, uint64_t unique, const char *name, size_t room)
{
	size_t child = find_name(s, name, room);

	if (!child)
		return reply(s, unique, -ENOENT, NULL, 0);
	if (s->nodes[child].kind == FUSE_NODE_TEXT && s->refreshing != unique) {
		s->refresh = child;
		s->refreshing = unique;
		return FUSE_SERVE_REFRESH;
	}
	return reply_entry(s, unique, child);
}

/* Answer the request in the shared page: 0, FUSE_SERVE_REFRESH if it cannot be answered yet, or -errno. */
static int answer(struct fuse_server *s)
{
	struct fuse_in_header h;
	const void *arg = s->shared->request + sizeof(h);
	struct fuse_init_in init = { 0 };
	size_t size, node;

	memcpy(&h, s->shared->request, sizeof(h));
	if (h.len < sizeof(h) + argument_size(h.opcode) || h.len > FUSE_REQUEST_SIZE)
		return reply(s, h.unique, -EINVAL, NULL, 0);
	size = h.len - sizeof(h);
	/* FUSE_INIT names no node; the root stands in for it */
	node = h.nodeid ? (size_t)h.nodeid - 1 : 0;
	if (node >= s->n)
		return reply(s, h.unique, -ESTALE, NULL, 0);
	switch (h.opcode) {
	case FUSE_INIT:
		memcpy(&init, arg, size < sizeof(init) ? size : sizeof(init));
		return do_init(s, h.unique, &init);
	case FUSE_LOOKUP:
		return do_lookup(s, h.unique, arg, size);
	case FUSE_GETATTR:
		return do_getattr(s, h.unique, node);
	case FUSE_OPENDIR:
		return reply(s, h.unique, 0, &(struct fuse_open_out){ 0 }, sizeof(struct fuse_open_out));
	case FUSE_READDIR:
		return do_readdir(s, h.unique, arg);
	case FUSE_OPEN:
		return do_open(s, h.unique, node, arg);
	case FUSE_READ:
		return do_read(s, h.unique, node, arg);
	case FUSE_STATFS:
		return do_statfs(s, h.unique);
	case FUSE_FLUSH:
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		return reply(s, h.unique, 0, NULL, 0);
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		/* never answered. An INTERRUPT can only name a request that has been answered already: one at a time is */
		return 0;
	case FUSE_WRITE:
	case FUSE_SETATTR:
	case FUSE_CREATE:
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
	case FUSE_SYMLINK:
	case FUSE_LINK:
		return reply(s, h.unique, -EROFS, NULL, 0);
	default:
		return reply(s, h.unique, -ENOSYS, NULL, 0);
	}
}

static uint64_t number(const struct fuse_shared *shared)
{
	uint64_t unique;

	memcpy(&unique, shared->request + offsetof(struct fuse_in_header, unique), sizeof(unique));
	return unique;
}

/* What another process was at when it ended, or what has its text by now. */
static int answer_left(struct fuse_server *s)
{
	struct fuse_shared *shared = s->shared;
	uint64_t unique = number(shared);

	if (unique == s->refreshing)
		return answer(s);
	if (shared->tried != unique) {
		shared->tried = unique;
		shared->tries = 0;
	}
	return ++shared->tries < MOST_TRIES ? answer(s) : reply(s, unique, -EIO, NULL, 0);
}

int fuse_serve(struct fuse_server *s)
{
	struct fuse_shared *shared = s->shared;
	int err = number(shared) == shared->answered ? 0 : answer_left(s);

	while (!err) {
		ssize_t got;

		shared->answered = number(shared);
		err = await_request(s);
		if (err)
			return err;
		got = read(s->fd, shared->request, sizeof(shared->request));
		if (got < 0 && errno != ENOENT && errno != EAGAIN)	/* these: interrupted before we saw it */
			return errno == ENODEV ? FUSE_SERVE_ENDED : -errno;
		if (got >= 0)
			err = answer(s);
	}
	return err == -ENODEV ? FUSE_SERVE_ENDED : err;
}
