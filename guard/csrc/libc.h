/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What of libc the capture path calls that Python's own modules do not have. Here because the core is loaded anyway:
 * ctypes would be another 170 KB in every initramfs.
 */
#ifndef OLDMEM_LIBC_H
#define OLDMEM_LIBC_H

#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>

int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
int umount2(const char *target, int flags);
int mlock(const void *address, size_t n);
int prctl(int option, ...);
int unshare(int flags);

#endif
