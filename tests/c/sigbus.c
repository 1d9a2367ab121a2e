/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * sigbus GUARD OTHER STEP: two copies of the library in one process, the one that this program is linked with and OTHER, a
 * shared object of the same sources, and a handler for SIGBUS of the program's own; in every STEPth order, with more
 * segments added by each copy whenever. Each copy must get its own faults, the program all others, once each, and a process
 * without a handler must die of them. GUARD is that of the example in tests/c/__init__.py, which allows pages from
 * 40 on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <err.h>
#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <oldmem_guard.h>

enum { PAGE = 4096, THREADS = 16, FIRST = 40 };	/* pages from FIRST on are allowed */

#define CHECK(what) ((what) ? (void)0 : errx(1, "%s:%d: not true: %s", __FILE__, __LINE__, #what))

struct copy {
	oldmem_guard_status (*new)(oldmem_guard **guard);
	oldmem_guard_status (*open)(oldmem_guard *guard, const char *path);
	oldmem_guard_status (*add)(oldmem_guard *guard, int fd, uint64_t offset, uint64_t paddr, uint64_t size,
				   oldmem_guard_how how);
	oldmem_guard_status (*read)(oldmem_guard *guard, uint64_t paddr, void *buffer, size_t n);
	oldmem_guard_status (*counters)(const oldmem_guard *guard, oldmem_guard_counters *counters, size_t size);
	void (*close)(oldmem_guard *guard);
	oldmem_guard *guard;
	uint64_t pages, failed;
};

static const char *path;
static struct copy copies[2];
static int image;		/* of no bytes: each page fails */
static volatile char *theirs;	/* a page of nobody's here that fails */

static struct sigaction before_mine;
static bool mine_there;
static sigjmp_buf back;
static atomic_int called;
static volatile uintptr_t handler_at;

static void find_all(struct copy *c, void *library)
{
	*c = (struct copy){
		.new = dlsym(library, "oldmem_guard_new"),
		.open = dlsym(library, "oldmem_guard_open"),
		.add = dlsym(library, "oldmem_guard_add_segment"),
		.read = dlsym(library, "oldmem_guard_read"),
		.counters = dlsym(library, "oldmem_guard_get_counters"),
		.close = dlsym(library, "oldmem_guard_close"),
	};
	CHECK(c->new && c->open && c->add && c->read && c->counters && c->close);
}

/* One more mapped segment, of one page. The first one installs the copy's handler. */
static void add(struct copy *c)
{
	if (!c->guard)
		CHECK(!c->new(&c->guard) && !c->open(c->guard, path));
	CHECK(!c->add(c->guard, image, 0, (FIRST + c->pages++) * PAGE, PAGE, OLDMEM_GUARD_MMAP));
}

/* All of its pages fail; the program's handler may be asked first, and passes that on. */
static void read_all(struct copy *c)
{
	oldmem_guard_counters counted;
	char bytes[8 * PAGE];

	called = 0;
	CHECK(c->pages <= 8);
	memset(bytes, 1, sizeof(bytes));
	CHECK(!c->read(c->guard, FIRST * PAGE, bytes, c->pages * PAGE));
	for (size_t i = 0; i < c->pages * PAGE; i++)
		CHECK(!bytes[i]);
	c->failed += c->pages;
	CHECK(!c->counters(c->guard, &counted, sizeof(counted)));
	CHECK(counted.pages_failed == c->failed);
}

static void jump_out(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	handler_at = (uintptr_t)&sig;
	called++;
	CHECK(info->si_addr == theirs);
	siglongjmp(back, 1);
}

static void jump_out_plainly(int sig)
{
	CHECK(sig == SIGBUS);
	called++;
	siglongjmp(back, 1);
}

/* A handler as oldmem_guard.h wants it. */
static void pass_on(int sig, siginfo_t *info, void *context)
{
	if (++called > 4 * 8)
		_exit(42);	/* handlers that call each other */
	if (before_mine.sa_flags & SA_SIGINFO)
		before_mine.sa_sigaction(sig, info, context);
	else if (before_mine.sa_handler != SIG_DFL && before_mine.sa_handler != SIG_IGN)
		before_mine.sa_handler(sig);
	else
		signal(SIGBUS, SIG_DFL);
}

static void install(void (*full)(int, siginfo_t *, void *), void (*plain)(int), struct sigaction *old)
{
	struct sigaction action = { .sa_flags = SA_NODEFER | SA_ONSTACK };

	if (full) {
		action.sa_sigaction = full;
		action.sa_flags |= SA_SIGINFO;
	} else {
		action.sa_handler = plain;
	}
	CHECK(!sigaction(SIGBUS, &action, old));
}

/* Touch the foreign page; true if a handler jumped out, else the process is dead. */
static bool touch(void)
{
	if (sigsetjmp(back, 1))
		return true;
	*theirs = 1;	/* valgrind leaves out reads that nobody needs */
	return false;
}

/* Runs it in a process of its own, which must end so. */
static void in_child(void (*work)(unsigned), unsigned argument, int signal_or_0, const char *what)
{
	int status;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		signal(SIGBUS, SIG_DFL);	/* a sanitizer has its own */
		work(argument);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	if (signal_or_0 ? !WIFSIGNALED(status) || WTERMSIG(status) != signal_or_0 : status)
		errx(1, "%s, order %#x: ended with %#x", what, argument, (unsigned)status);
}

/*
 * Eight steps, each of three kinds: a copy adds a segment and reads all that it has, or (once) the program's handler is
 * installed in front of what is there. Orders are numbers of eight digits to the base of three.
 */
static void in_order(unsigned order)
{
	for (int step = 0; step < 8; step++, order /= 3) {
		if (order % 3 == 2 && !mine_there) {
			install(pass_on, NULL, &before_mine);
			mine_there = true;
		} else if (order % 3 < 2) {
			add(&copies[order % 3]);
		}
		for (int i = 0; i < 2; i++)
			if (copies[i].pages)
				read_all(&copies[i]);
	}
}

/* Twice: by the handler below all, and by the one in front if there is one. */
static void then_caught(unsigned order)
{
	in_order(order);
	called = 0;
	CHECK(touch() && touch() && called == (mine_there ? 4 : 2));
}

static void caught_below(unsigned order)
{
	install(jump_out, NULL, NULL);
	then_caught(order);
}

static void caught_below_plainly(unsigned order)
{
	install(NULL, jump_out_plainly, NULL);
	then_caught(order);
}

static void then_die(unsigned order)
{
	in_order(order);
	touch();
}

static void ignored_below(unsigned order)
{
	signal(SIGBUS, SIG_IGN);
	in_order(order);
	raise(SIGBUS);
	raise(SIGBUS);
	read_all(&copies[0]);
}

static void ignored_below_but_a_fault(unsigned order)
{
	ignored_below(order);
	touch();	/* which cannot be ignored */
}

static void sent(unsigned order)
{
	in_order(order);
	raise(SIGBUS);
}

/* A buffer of the caller's that fails is no page of old memory that failed. */
static void bad_buffer(unsigned order)
{
	char *bytes = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int there = memfd_create("there", MFD_CLOEXEC);

	install(jump_out, NULL, NULL);
	in_order(order);
	CHECK(bytes != MAP_FAILED && there >= 0 && !ftruncate(there, PAGE));
	CHECK(!copies[0].add(copies[0].guard, there, 0, 60 * PAGE, PAGE, OLDMEM_GUARD_MMAP));
	CHECK(!copies[0].read(copies[0].guard, 60 * PAGE, bytes, PAGE));
	called = 0;
	if (!sigsetjmp(back, 1)) {
		copies[0].read(copies[0].guard, 60 * PAGE, (void *)theirs, PAGE);
		errx(1, "read into what cannot be written to");
	}
	CHECK(called == 1);
}

static pthread_barrier_t together;

static void *first_call(void *number)
{
	struct copy mine = copies[(uintptr_t)number % 2];

	pthread_barrier_wait(&together);
	for (int i = 0; i < 4; i++) {
		add(&mine);
		read_all(&mine);
	}
	mine.close(mine.guard);
	return NULL;
}

/* Handlers are installed by many threads at once; then a foreign fault goes through all that there are, once. */
static void threads(unsigned unused)
{
	pthread_t made[THREADS];

	(void)unused;
	install(jump_out, NULL, NULL);
	CHECK(!pthread_barrier_init(&together, NULL, THREADS));
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&made[i], NULL, first_call, (void *)i));
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_join(made[i], NULL));
	CHECK(called == 0 && touch() && called == 1);
}

static void *on_alternate_stack(void *unused)
{
	static char stack[1 << 16];
	const stack_t alternate = { .ss_sp = stack, .ss_size = sizeof(stack) };
	stack_t earlier;

	CHECK(!sigaltstack(&alternate, &earlier));
	for (int i = 0; i < 3; i++) {
		read_all(&copies[0]);
		read_all(&copies[1]);
		handler_at = 0;
		CHECK(touch());
		CHECK(handler_at >= (uintptr_t)stack && handler_at < (uintptr_t)stack + sizeof(stack));
	}
	CHECK(!sigaltstack(&earlier, NULL));	/* a sanitizer has its own */
	return unused;
}

/* As Go's threads are: little stack, and another one for signals. */
static void alternate_stack(unsigned order)
{
	pthread_attr_t attributes;
	pthread_t thread;

	install(jump_out, NULL, NULL);
	in_order(order);
	CHECK(!pthread_attr_init(&attributes));
	CHECK(!pthread_attr_setstacksize(&attributes, (size_t)sysconf(_SC_THREAD_STACK_MIN) + (1 << 17)));
	CHECK(!pthread_create(&thread, &attributes, on_alternate_stack, NULL));
	CHECK(!pthread_join(thread, NULL));
}

int main(int argc, char **argv)
{
	unsigned step;
	void *library;

	if (argc != 4)
		errx(2, "usage: sigbus GUARD OTHER STEP");
	step = (unsigned)atoi(argv[3]);
	path = argv[1];
	library = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
	if (!library)
		errx(1, "%s", dlerror());
	find_all(&copies[1], library);
	copies[0] = (struct copy){ oldmem_guard_new, oldmem_guard_open, oldmem_guard_add_segment, oldmem_guard_read,
				   oldmem_guard_get_counters, oldmem_guard_close, NULL, 0, 0 };
	CHECK(copies[0].add != copies[1].add);
	image = memfd_create("image", MFD_CLOEXEC);
	theirs = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, image, 0);
	CHECK(image >= 0 && theirs != MAP_FAILED);
	for (unsigned order = 0; order < 3 * 3 * 3 * 3 * 3 * 3 * 3 * 3; order += step) {
		in_child(then_die, order, SIGBUS, "no handler");
		in_child(caught_below, order, 0, "a handler below");
		in_child(caught_below_plainly, order, 0, "a plain handler below");
	}
	/* the linked copy, the other one, and the linked one again */
	in_child(ignored_below, 3, 0, "ignored");
	in_child(ignored_below_but_a_fault, 3, SIGBUS, "a fault, ignored");
	in_child(sent, 3, SIGBUS, "sent");
	in_child(bad_buffer, 3, 0, "a bad buffer");
	in_child(alternate_stack, 3, 0, "an alternate stack");
	for (unsigned i = 0; i < 20; i++)
		in_child(threads, i, 0, "threads");
	puts("all as it should be");
	return 0;
}
