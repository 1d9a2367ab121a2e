#define _GNU_SOURCE
#include "sigbus.h"
#include <errno.h>
static sigbus_handler *handler;
static struct sigaction earlier;
static int installed;
static void on(int sig, siginfo_t *info, void *context)
{
	if (handler(info, context)) return;
	if (earlier.sa_flags & SA_SIGINFO) earlier.sa_sigaction(sig, info, context);
	else if (earlier.sa_handler != SIG_DFL && earlier.sa_handler != SIG_IGN) earlier.sa_handler(sig);
	else signal(SIGBUS, SIG_DFL);
}
int sigbus_catch(sigbus_handler *ours)
{
	struct sigaction a = { .sa_sigaction = on, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };
	if (installed) return 0;
	handler = ours; installed = 1;
	return sigaction(SIGBUS, &a, &earlier) ? -errno : 0;
}
