/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "sigbus.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

enum { NOBODY = 0, DONE = -1 };

/*
 * One word, for it has to be known, as a whole, before our handler can run. Whether it wants one argument or three is
 * not kept: it gets three, as from the kernel, which does not ask either (arch/x86/kernel/signal_64.c:
 * x64_setup_rt_frame(), arch/s390/kernel/signal.c:setup_rt_frame()).
 */
static _Atomic uintptr_t earlier = (uintptr_t)SIG_DFL;
static _Atomic(sigbus_handler *) handlers[SIGBUS_HANDLERS];
static _Atomic pid_t installer = NOBODY;

bool sigbus_is_fault(const siginfo_t *info)
{
	/* "action optional": some page that the process has was found to be broken, by nobody's access */
	return info->si_code > 0 && info->si_code != BUS_MCEERR_AO;
}

static void pass_on(int sig, siginfo_t *info, void *context)
{
	uintptr_t next = atomic_load_explicit(&earlier, memory_order_relaxed);

	if (next != (uintptr_t)SIG_DFL && next != (uintptr_t)SIG_IGN) {
		((void (*)(int, siginfo_t *, void *))next)(sig, info, context);
		return;
	}
	/* a fault cannot be ignored (kernel/signal.c:force_sig_info_to_task()) */
	if (next == (uintptr_t)SIG_IGN && !sigbus_is_fault(info))
		return;
	signal(SIGBUS, SIG_DFL);
	if (!sigbus_is_fault(info))
		raise(SIGBUS);
}

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	int saved = errno;

	for (int i = 0; i < SIGBUS_HANDLERS; i++) {
		sigbus_handler *ours = atomic_load_explicit(&handlers[i], memory_order_acquire);

		if (ours && ours(info, context)) {
			errno = saved;
			return;
		}
	}
	errno = saved;
	pass_on(sig, info, context);
}

static bool is_among_handlers(sigbus_handler *ours)
{
	for (int i = 0; i < SIGBUS_HANDLERS; i++) {
		sigbus_handler *there = NULL;

		if (atomic_compare_exchange_strong_explicit(&handlers[i], &there, ours, memory_order_release,
							    memory_order_relaxed) || there == ours)
			return true;
	}
	return false;
}

/* sigaction(2) cannot compare and exchange: whoever comes in between is noticed afterwards. */
static int install(void)
{
	/* Go's runtime stops a program whose handlers are not on the alternate stack (os/signal, "Go programs that use cgo") */
	const struct sigaction action = {
		.sa_sigaction = on_sigbus,
		.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK,
	};
	struct sigaction seen, replaced;

	if (sigaction(SIGBUS, NULL, &seen))
		return -errno;
	if (seen.sa_sigaction == on_sigbus)
		return 0;	/* of a process that had come so far when it was forked */
	atomic_store_explicit(&earlier, (uintptr_t)seen.sa_sigaction, memory_order_relaxed);
	if (sigaction(SIGBUS, &action, &replaced))
		return -errno;
	if (replaced.sa_sigaction != seen.sa_sigaction)
		atomic_store_explicit(&earlier, (uintptr_t)replaced.sa_sigaction, memory_order_relaxed);
	return 0;
}

/*
 * True if it is this thread that has to install the handler: one alone, for what two would replace might be each other's
 * work and a handler of somebody's in between. Others wait for its three system calls, in which no signal of its own
 * can hold it up. The number is the process's: a child that is forked meanwhile has no such thread.
 */
static bool is_mine_to_install(void)
{
	const struct timespec moment = { .tv_nsec = 50000 };	/* asleep, so that it goes on whatever its priority is */
	const pid_t me = getpid();

	for (;;) {
		pid_t who = atomic_load_explicit(&installer, memory_order_acquire);

		if (who == DONE)
			return false;
		if (who == me)
			nanosleep(&moment, NULL);
		else if (atomic_compare_exchange_strong_explicit(&installer, &who, me, memory_order_acquire,
								 memory_order_relaxed))
			return true;
	}
}

int sigbus_catch(sigbus_handler *ours)
{
	sigset_t all, before;
	int err = 0;

	if (!is_among_handlers(ours))
		return -ENOSPC;
	if (atomic_load_explicit(&installer, memory_order_acquire) == DONE)
		return 0;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);	/* Linux has a mask for each thread, and this sets the caller's */
	if (is_mine_to_install()) {
		err = install();
		atomic_store_explicit(&installer, err ? NOBODY : DONE, memory_order_release);
	}
	sigprocmask(SIG_SETMASK, &before, NULL);
	return err;
}
