/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The request loop of the FUSE server, on raw /dev/fuse (include/uapi/linux/fuse.h): read-only, one thread, one
 * buffer. It returns to its caller only when there is something to decide.
 */
#ifndef OLDMEM_FUSE_H
#define OLDMEM_FUSE_H

#include "view.h"

enum fuse_node_kind {
	FUSE_NODE_FOLDER,
	FUSE_NODE_CACHED,	/* the view, through the page cache: for mmap and small reads */
	FUSE_NODE_DIRECT,	/* the view, FOPEN_DIRECT_IO: for large reads, leaves no copy in the page cache */
	FUSE_NODE_TEXT,		/* literal bytes that may change: the caller is asked at each look at the name */
};

struct fuse_node {
	enum fuse_node_kind kind;
	char name[24];
	const uint8_t *text;
	uint64_t text_size;
};

enum { FUSE_SERVE_ENDED = 0, FUSE_SERVE_REFRESH = 1 };

struct fuse_server {
	int fd;				/* /dev/fuse, mounted */
	int wake_fd;			/* readable once a signal wants the caller; negative: none */
	const struct view *view;
	size_t n;
	struct fuse_node *nodes;	/* [0] is the root: a folder, or the one file; node ids are index + 1 */
	uint32_t max_read;		/* bytes of one READ */
	uint8_t *buffer;		/* page aligned, max_read + one page */
	int64_t time;			/* mtime of everything, seconds */
	uint64_t requests, reads;
	size_t refresh;			/* FUSE_SERVE_REFRESH: the text node that is looked up */
	uint64_t pending_lookup;	/* unique of that request; answered on the next call */
};

/*
 * Serve until unmounted (FUSE_SERVE_ENDED), until a text node is looked up and wants fresh text (FUSE_SERVE_REFRESH:
 * set it and call again), or until a signal, told of by wake_fd too (-EINTR), or an error (-errno).
 */
int fuse_serve(struct fuse_server *s);

#endif
