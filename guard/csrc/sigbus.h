/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * SIGBUS is the process's, and others want it too: programs, language runtimes, a second copy of this code in another
 * library. So there is one handler for each copy, installed once; it asks those who wait for a fault of their own, and
 * passes all else on to the handler that was there before. Whoever replaces it and passes on to it, as
 * oldmem_guard.h demands, is not replaced in turn when more is to be caught later.
 */
#ifndef OLDMEM_SIGBUS_H
#define OLDMEM_SIGBUS_H

#include <signal.h>
#include <stdbool.h>

enum { SIGBUS_HANDLERS = 4 };	/* of one copy */

/*
 * Was that fault ours? If so it may also jump out of the handler, which has SA_NODEFER. It runs on the thread's
 * alternate stack where there is one, and calls nothing but what is async-signal-safe. errno is kept.
 */
typedef bool sigbus_handler(const siginfo_t *info, void *context);

/* Did the thread's own access raise it, so that it is raised again when the handler returns? Not if somebody sent it. */
bool sigbus_is_fault(const siginfo_t *info);

/*
 * Ask `ours` about each SIGBUS from now on. Any number of times, by any number of threads at once, in signal handlers
 * and in processes that were forked in the middle of it: no lock is held. 0 or -errno; -ENOSPC if too many others are
 * asked already.
 */
int sigbus_catch(sigbus_handler *ours);

#endif
