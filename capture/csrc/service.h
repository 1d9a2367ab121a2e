/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the processes of a FUSE server (capture/service.py) share and wait for, as far as Python does not have it.
 */
#ifndef OLDMEM_SERVICE_H
#define OLDMEM_SERVICE_H

#include "fuse.h"

/* `size` bytes, a huge page's, in one if the kernel has it; shared with children. NULL with errno set. */
void *service_buffer(size_t size);

/* Wait up to `timeout` ms (negative: for ever) for one of `watch`: the bits of those that are ready, or -errno. */
int service_watch(const int *watch, size_t n, int timeout);

/* Set and clear bits of shared->leaving; what was there before. */
uint32_t service_leave(struct fuse_shared *shared, uint32_t bits);
uint32_t service_arrive(struct fuse_shared *shared, uint32_t bits);

/* Lock what is resident now, and nothing that is mapped later. 0 or -errno. */
int service_lock_memory(void);

#endif
