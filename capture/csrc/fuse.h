/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The request loop of the FUSE server, on raw /dev/fuse (include/uapi/linux/fuse.h): read-only, one thread, one
 * buffer. It returns to its caller only when there is something to decide.
 *
 * Several processes may hold the descriptor, of which one serves. Should it die, another one goes on: read(2) puts
 * each request into a page that they share. The kernel has a request on its list of those to be answered once read(2)
 * has copied it (fs/fuse/dev.c:fuse_dev_do_read()), whoever writes that answer (fuse_dev_do_write() knows it by its
 * number alone), and a killed process leaves neither before it is done (where the page is mapped, as it is: a fault
 * could fail by a signal, and the request with EIO). So what lies in the page and is not marked as answered is what
 * there is to answer. Doing so twice does no harm: the kernel does not know the number any more. FUSE_NOTIFY_RESEND
 * (6.9+), which would put such requests back, is not needed.
 */
#ifndef OLDMEM_FUSE_H
#define OLDMEM_FUSE_H

#include "view.h"

enum { FUSE_REQUEST_SIZE = 8192 };	/* FUSE_MIN_READ_BUFFER: read(2) insists on that much room */

enum fuse_node_kind {
	FUSE_NODE_FOLDER,
	FUSE_NODE_CACHED,	/* the view, through the page cache: for mmap and small reads */
	FUSE_NODE_DIRECT,	/* the view, FOPEN_DIRECT_IO: for large reads, leaves no copy in the page cache */
	FUSE_NODE_TEXT,		/* a file's bytes that may change: the caller is asked at each look at the name */
};

struct fuse_node {
	enum fuse_node_kind kind;
	char name[24];
	int text_fd;
};

/* Mapped by all processes of a server; all zero at first. */
struct fuse_shared {
	uint8_t request[FUSE_REQUEST_SIZE];	/* the last one that was read */
	uint64_t answered;			/* its number, once there is nothing to do for it any more */
	uint64_t tried;				/* number of the last one that was begun anew */
	uint32_t tries;				/* how often */
	uint32_t mounted, committed, stopping;	/* what the command has told (capture/service.py) */
	uint32_t leaving;			/* bit by bit: the processes that end by their own will */
};

enum { FUSE_WATCHED = 2 };	/* each costs every request some 50 ns */

/* FUSE_SERVE_WOKEN: one of `watch` can be read, or its other end is gone; or the `deadline` has come */
enum { FUSE_SERVE_ENDED = 1, FUSE_SERVE_REFRESH, FUSE_SERVE_WOKEN };

struct fuse_server {
	int fd;				/* /dev/fuse, mounted, O_NONBLOCK */
	int watch[FUSE_WATCHED];	/* descriptors that the caller wants to hear of; negative: none */
	uint64_t deadline;		/* CLOCK_MONOTONIC, ns; 0: none */
	const struct view *view;
	size_t n;
	struct fuse_node *nodes;	/* [0] is the root: a folder, or the one file; node ids are index + 1 */
	uint32_t max_read;		/* bytes of one READ */
	uint8_t *buffer;		/* of fuse_buffer() */
	struct fuse_shared *shared;
	int64_t time;			/* mtime of everything, seconds */
	size_t refresh;			/* FUSE_SERVE_REFRESH: the text node that is looked up */
	uint64_t refreshing;		/* number of that request, which is answered on the next call */
};

/*
 * Serve until unmounted (FUSE_SERVE_ENDED), until a text node is looked up and wants fresh text (FUSE_SERVE_REFRESH:
 * write it and call again), until the caller is wanted (FUSE_SERVE_WOKEN, or -EINTR), or an error (-errno). First
 * comes what another process has left unanswered; what has ended several of them gets EIO.
 */
int fuse_serve(struct fuse_server *s);

#endif
