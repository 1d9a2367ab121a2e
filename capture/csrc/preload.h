/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What "oldmem run" puts in front of libc in a collector (LD_PRELOAD), for speed alone. The vmcore that programs open is
 * a file with the right bytes, which a server gives out (FUSE): every way to read it is right without this library. It
 * makes read(2) and mmap(2) of that file as fast as they are with the kernel's own: copies out of, or mappings made of,
 * the files that show old memory (preload_read.c). Whatever it cannot do goes to the kernel, so that what it knows about
 * descriptors may be out of date: it costs time then.
 *
 * It has one task beside that: where no file has the name of the vmcore, and none can be made (/proc), that name leads to
 * the file all the same (preload_name.c).
 */
#ifndef OLDMEM_PRELOAD_H
#define OLDMEM_PRELOAD_H

#include <sys/types.h>

#include "sys.h"
#include "window.h"

#if __SIZEOF_LONG__ != 8
#error "made for file offsets of 64 bits"
#endif

#define EXPORT __attribute__((visibility("default")))
/* On these machines a file offset has 64 bits under either name. */
#define ALSO(name, alias_of) \
	EXPORT extern __typeof__(alias_of) name __attribute__((alias(#alias_of)))

/* Of these, all that is called by us. */
#define NEXT_FUNCTIONS(X) \
	X(open) X(openat) X(__open_2) X(__openat_2) X(close) X(dup2) X(dup3) X(fopen) X(freopen) \
	X(read) X(pread) X(readv) X(preadv) X(preadv2) X(__read_chk) X(__pread_chk) X(mmap) X(mremap) \
	X(stat) X(lstat) X(fstatat) X(__xstat) X(__lxstat) X(__fxstatat) X(statx) \
	X(access) X(faccessat) X(euidaccess) X(getxattr) X(lgetxattr) X(listxattr) X(llistxattr)

#define NEXT_NUMBER(name) NEXT_##name,
enum next_function { NEXT_FUNCTIONS(NEXT_NUMBER) NEXT_COUNT };

/* The function of that name that comes behind ours, libc's as a rule. */
#define NEXT(name) ((__typeof__(name) *)preload_next(NEXT_##name))

void *preload_next(enum next_function which);

struct preload {
	bool active;			/* there is a plan; set before main() */
	struct composer composer;
	char real[PROC_FD_PATH];	/* what leads to the vmcore where no file has its name */
};

extern struct preload preload;

/* May reads and mappings of the descriptor be made by us? errno stays as it is. Async-signal-safe. */
bool preload_ours(int fd);

/* The descriptor may be another file's from now on. */
void preload_unknown(int fd);

/* `path` led to no file (errno is ENOENT, and stays): is it the name of the vmcore, which no file has? */
bool preload_named(int dirfd, const char *path);

#endif
