#ifndef OLDMEM_SIGBUS_H
#define OLDMEM_SIGBUS_H
#include <signal.h>
#include <stdbool.h>
typedef bool sigbus_handler(const siginfo_t *info, void *context);
int sigbus_catch(sigbus_handler *ours);
#endif
