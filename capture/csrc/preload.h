/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What "oldmem run" puts in front of libc in a collector (LD_PRELOAD): the vmcore is opened (preload.c), looked at
 * (preload_stat.c), read and mapped (preload_read.c) inside of the collector's own process.
 *
 * The descriptor that a program gets is one of an empty file as large as the vmcore (the plan's shape), opened for
 * writing only and sealed against it. So the kernel itself keeps size, offset, dup(2), close(2) and inheritance; what it
 * cannot answer rightly it refuses (EBADF to read, EACCES to mmap), and only then do we look whether it is ours. Other
 * files cost nothing, a call that is not known here fails instead of reading zeros, and nothing about descriptors is
 * remembered.
 */
#ifndef OLDMEM_PRELOAD_H
#define OLDMEM_PRELOAD_H

#include <sys/stat.h>

#include "window.h"

#if __SIZEOF_LONG__ != 8
#error "made for file offsets of 64 bits"
#endif

#define EXPORT __attribute__((visibility("default")))
/* On these machines a file offset has 64 bits under either name. */
#define ALSO(name, alias_of) \
	EXPORT extern __typeof__(alias_of) name __attribute__((alias(#alias_of)))

/* The function of that name that comes behind ours, libc's as a rule. */
#define NEXT(name) \
	({ \
		static void *cache; \
		(__typeof__(name) *)preload_next(&cache, #name); \
	})

void *preload_next(void **cache, const char *name);

struct preload {
	bool active;		/* there is a plan; set before main() */
	struct composer composer;
};

extern struct preload preload;

/* The rules are there, and what is mapped is safe to touch: to be asked before anything is read. 0, or errno. */
int preload_ready(void);

/* Is it the file that programs open as vmcore, or the one that they get for it? */
bool preload_is_target(const struct stat *st);
bool preload_is_shape(const struct stat *st);

/* Is the descriptor one of the shape? errno stays as it is. */
bool preload_ours(int fd);

/* Where no file has the name of the vmcore: does a path that did not lead to one (errno is ENOENT) mean it? */
bool preload_named(int dirfd, const char *path);

/* Another descriptor of the shape, or -1 with errno; `flags` are those that the program opens the vmcore with. */
int preload_open(int flags);

/* As read(2), of a descriptor that is ours. */
ssize_t preload_read_on(int fd, void *buf, size_t n);

#endif
