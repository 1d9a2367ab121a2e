/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A program that reads a vmcore in the way WAY and compares what it gets with the file SAVED: reader WAY VMCORE SAVED.
 * Status 0 and no output if all is the same; else one line says what is not.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PIECE = 1 << 20 };

static const char *path;
static const uint8_t *saved;
static size_t size;

static void same(const void *got, size_t n, size_t at)
{
	if (at > size || n > size - at)
		errx(1, "%zu bytes at %zu: more than there are", n, at);
	if (memcmp(got, saved + at, n))
		errx(1, "wrong bytes in %zu at %zu", n, at);
}

static void whole(size_t at)
{
	if (at != size)
		errx(1, "ended at %zu of %zu", at, size);
}

static int opened(const char *name, int flags)
{
	int fd = open(name, flags);

	if (fd < 0)
		err(1, "open %s", name);
	return fd;
}

static void read_all(int fd)
{
	static uint8_t buf[PIECE];
	size_t at = 0;
	ssize_t got;

	while ((got = read(fd, buf, sizeof(buf))) > 0) {
		same(buf, (size_t)got, at);
		at += (size_t)got;
	}
	if (got < 0)
		err(1, "read at %zu", at);
	whole(at);
}

static void map_all(int fd)
{
	struct stat st;
	void *map;

	if (fstat(fd, &st) || (size_t)st.st_size != size)
		errx(1, "fstat says %zd bytes", (ssize_t)st.st_size);
	map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (map == MAP_FAILED)
		err(1, "mmap");
	same(map, size, 0);
	munmap(map, size);
}

static void stream_all(FILE *file, const char *how)
{
	static uint8_t buf[64 << 10];
	size_t at = 0, got;

	if (!file)
		err(1, "%s", how);
	while ((got = fread(buf, 1, sizeof(buf), file))) {
		same(buf, got, at);
		at += got;
	}
	if (ferror(file))
		err(1, "%s at %zu", how, at);
	whole(at);
	if (fseeko(file, 5, SEEK_SET) || fread(buf, 1, 100, file) != 100)
		errx(1, "%s: no seeking", how);
	same(buf, 100, 5);
	fclose(file);
}

static void by_reading(void)
{
	read_all(opened(path, O_RDONLY));
	map_all(opened(path, O_RDONLY | O_CLOEXEC));
}

static void by_stdio(void)
{
	stream_all(fopen(path, "r"), "fopen");
	stream_all(fopen(path, "rbe"), "fopen");
	stream_all(fdopen(opened(path, O_RDONLY), "r"), "fdopen");
	stream_all(freopen(path, "r", fopen("/dev/null", "r")), "freopen");
	if (!freopen(path, "r", stdin))
		err(1, "freopen of stdin");
	stream_all(stdin, "stdin");
}

static void by_reopening(void)
{
	static const int flags[] = { O_RDONLY, O_PATH };
	char link[64];

	for (int i = 0; i < 2; i++) {
		int fd = opened(path, flags[i]), again;

		for (int k = 0; k < 2; k++) {
			snprintf(link, sizeof(link), k ? "/dev/fd/%d" : "/proc/self/fd/%d", fd);
			again = opened(link, O_RDONLY);
			read_all(again);
			map_all(again);
			close(again);
		}
	}
	if (dup2(opened(path, O_RDONLY), 0) || close(99) == 0)
		errx(1, "dup2");
	read_all(opened("/dev/stdin", O_RDONLY));
	read_all(0);
}

/* A descriptor that comes by a socket is one that nobody has opened here. */
static void by_passing(void)
{
	union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = { 0 };
	struct iovec one = { "x", 1 };
	struct msghdr m = { .msg_iov = &one, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };
	int pair[2], fd = opened(path, O_RDONLY);
	char got;

	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	control.align = (struct cmsghdr){ CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS };
	memcpy(CMSG_DATA(&control.align), &fd, sizeof(fd));
	if (sendmsg(pair[0], &m, 0) < 0)
		err(1, "sendmsg");
	close(fd);
	one.iov_base = &got;
	if (recvmsg(pair[1], &m, MSG_WAITALL) < 0)
		err(1, "recvmsg");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(fd));
	read_all(fd);
	map_all(fd);
}

static void copied(int out, size_t n)
{
	void *map = mmap(NULL, n, PROT_READ, MAP_SHARED, out, 0);

	if (map == MAP_FAILED)
		err(1, "mmap of the copy");
	same(map, n, 0);
	whole(n);
	munmap(map, n);
	close(out);
}

static void by_copying(void)
{
	int in = opened(path, O_RDONLY), out = memfd_create("copy", 0), ends[2];
	size_t at = 0;
	ssize_t n;

	while ((n = sendfile(out, in, NULL, PIECE)) > 0)
		at += (size_t)n;
	if (n < 0)
		err(1, "sendfile at %zu", at);
	copied(out, at);
	lseek(in, 0, SEEK_SET);
	out = memfd_create("copy", 0);
	if (pipe(ends))
		err(1, "pipe");
	while ((n = splice(in, NULL, ends[1], NULL, 16 * PAGE, 0)) > 0)
		while (n > 0) {
			ssize_t went = splice(ends[0], NULL, out, NULL, (size_t)n, 0);

			if (went <= 0)
				err(1, "splice out");
			n -= went;
		}
	if (n < 0)
		err(1, "splice");
	copied(out, (size_t)lseek(out, 0, SEEK_END));
}

/* One READ at a time, through rings that are mapped by hand: no library. */
static void by_uring(void)
{
	struct io_uring_params p = { 0 };
	int ring = (int)syscall(SYS_io_uring_setup, 4, &p), in = opened(path, O_RDONLY);
	static uint8_t buf[PIECE];
	struct io_uring_sqe *sqes;
	uint8_t *sq, *cq;
	size_t at = 0;

	if (ring < 0)
		err(77, "no io_uring");
	sq = mmap(NULL, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring,
		  IORING_OFF_CQ_RING);
	sqes = mmap(NULL, p.sq_entries * sizeof(*sqes), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || sqes == MAP_FAILED)
		err(1, "mmap of the rings");
	for (;;) {
		uint32_t *tail = (uint32_t *)(sq + p.sq_off.tail), *head = (uint32_t *)(cq + p.cq_off.head);
		uint32_t slot = *tail & *(uint32_t *)(sq + p.sq_off.ring_mask);
		const struct io_uring_cqe *done = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
		int32_t got;

		sqes[slot] = (struct io_uring_sqe){
			.opcode = IORING_OP_READ, .fd = in, .off = at, .addr = (uintptr_t)buf, .len = sizeof(buf),
		};
		((uint32_t *)(sq + p.sq_off.array))[slot] = slot;
		__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
		if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
			err(1, "io_uring_enter");
		got = done[*head & *(uint32_t *)(cq + p.cq_off.ring_mask)].res;
		__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
		if (got < 0)
			errx(1, "io_uring read at %zu: %s", at, strerror(-got));
		if (!got)
			break;
		same(buf, (size_t)got, at);
		at += (size_t)got;
	}
	whole(at);
}

static void by_folder(void)
{
	char folder[4096], base[4096];
	struct statx stx;
	struct stat st;
	int dirfd, fd;

	strcpy(folder, path);
	strcpy(base, basename(folder));
	strcpy(folder, path);
	dirfd = opened(dirname(folder), O_RDONLY | O_DIRECTORY);
	fd = openat(dirfd, base, O_RDONLY | O_NOFOLLOW);
	if (fd < 0)
		err(1, "openat");
	read_all(fd);
	if (fstatat(dirfd, base, &st, AT_SYMLINK_NOFOLLOW) || (size_t)st.st_size != size || !S_ISREG(st.st_mode))
		errx(1, "fstatat");
	if (statx(dirfd, base, AT_SYMLINK_NOFOLLOW, STATX_SIZE, &stx) || stx.stx_size != size)
		errx(1, "statx");
	if (stat(path, &st) || (size_t)st.st_size != size || lstat(path, &st) || (size_t)st.st_size != size)
		errx(1, "stat");
	if (access(path, R_OK) || faccessat(dirfd, base, R_OK, 0) || faccessat(AT_FDCWD, path, R_OK, AT_EACCESS) ||
	    euidaccess(path, R_OK))
		err(1, "access");
	if (fchdir(dirfd))
		err(1, "fchdir");
	read_all(opened(base, O_RDONLY));
}

static void must(int error, const char *what, bool failed)
{
	if (!failed)
		errx(1, "%s: no error", what);
	if (errno != error)
		err(1, "%s: not %s but", what, strerror(error));
}

static void by_mistake(void)
{
	int fd = opened(path, O_RDONLY), by_path = opened(path, O_PATH);
	void *volatile nowhere = (void *)8;	/* volatile: compilers see through it */
	char *edge = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *map;
	volatile size_t far_too_much = SIZE_MAX;
	struct iovec much[] = { { edge, 10 }, { edge, (size_t)-1 } };
	struct stat st;

	munmap(edge + PAGE, PAGE);
	must(EFAULT, "read to nowhere", read(fd, nowhere, 100) < 0);
	must(EFAULT, "pread to nowhere", pread(fd, nowhere, 100, PAGE) < 0);
	must(EFAULT, "read to what is not writable", read(fd, (void *)(uintptr_t)saved, PAGE) < 0);
	if (lseek(fd, 0, SEEK_CUR))
		errx(1, "a failed read has moved the offset");
	if (pread(fd, edge + PAGE - 100, 100, 0) != 100)
		errx(1, "read to the edge");
	same(edge + PAGE - 100, 100, 0);
	must(EINVAL, "read before the start", pread(fd, edge, 1, -1) < 0);
	must(EFAULT, "pieces that are nowhere", readv(fd, nowhere, 1) < 0);
	must(EFAULT, "pieces that are nowhere", preadv(fd, nowhere, 1, 0) < 0);
	must(EINVAL, "more than can be", preadv(fd, much, 2, 0) < 0);
	must(EINVAL, "more than can be", readv(fd, much, 2) < 0);
	if (pread(fd, edge, far_too_much, 0) >= 0 || read(fd, edge, far_too_much) >= 0)
		errx(1, "a size that is no size");
	must(EBADF, "read of O_PATH", read(by_path, edge, 1) < 0);
	must(EBADF, "write", write(fd, "x", 1) < 0);
	must(EROFS, "open for writing", open(path, O_RDWR) < 0);
	must(EROFS, "open to truncate", open(path, O_WRONLY | O_TRUNC) < 0);
	if (read(fd, edge, 0) || pread(fd, edge, 10, (off_t)size) || pread(fd, edge, 10, (off_t)size - 4) != 4)
		errx(1, "at the end");
	if (lseek(fd, 7, SEEK_DATA) != 7 || lseek(fd, 7, SEEK_HOLE) != (off_t)size)
		errx(1, "holes where there are none");
	map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED || fstat(fd, &st) || st.st_blocks * 512 < st.st_size)
		err(1, "mmap");
	if (mprotect(map, PAGE, PROT_READ | PROT_WRITE) == 0)
		errx(1, "a shared mapping became writable");
}

/* A mapping moves as a mapping does, and never shows what lies behind it in the file that it is made of. */
static void by_moving(void)
{
	int fd = opened(path, O_RDONLY);

	for (size_t at = 0; at + 2 * PAGE <= size; at += 17 * PAGE) {
		char *map = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, (off_t)at), *moved;

		if (map == MAP_FAILED)
			err(1, "mmap");
		moved = mremap(map, PAGE, 2 * PAGE, MREMAP_MAYMOVE);
		if (moved != MAP_FAILED)
			same(map = moved, 2 * PAGE, at);
		moved = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (mremap(map, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved) != moved)
			err(1, "mremap");
		same(moved, PAGE, at);
		munmap(moved, PAGE);
	}
}

static volatile sig_atomic_t stop, signals;
static int shared_fd;

static void *read_on(void *number)
{
	unsigned seed = (unsigned)(uintptr_t)number;
	uint8_t buf[PAGE];

	while (!stop) {
		size_t at = (size_t)rand_r(&seed) * PAGE % (size - PAGE);

		if (pread(shared_fd, buf, PAGE, (off_t)at) != PAGE)
			err(1, "pread");
		same(buf, PAGE, at);
	}
	return NULL;
}

static void by_forking(void)
{
	pthread_t threads[4];

	shared_fd = opened(path, O_RDONLY);
	for (uintptr_t i = 0; i < 4; i++)
		pthread_create(&threads[i], NULL, read_on, (void *)(i + 1));
	for (int i = 0; i < 150; i++) {
		pid_t child = fork();
		int status;

		if (!child) {
			uint8_t buf[PAGE], *map;
			size_t at = (size_t)i * 99991 * PAGE % (size - PIECE);

			alarm(60);	/* hung: nothing here takes a hundredth of it */
			if (pread(shared_fd, buf, PAGE, (off_t)at) != PAGE)
				err(1, "pread");
			same(buf, PAGE, at);
			map = mmap(NULL, PIECE, PROT_READ, MAP_SHARED, shared_fd, (off_t)(at / PAGE * PAGE));
			if (map == MAP_FAILED)
				err(1, "mmap");
			same(map, PIECE, at);
			_exit(0);
		}
		if (waitpid(child, &status, 0) != child || status)
			errx(1, "child %d: %s %d", i, WIFSIGNALED(status) ? "signal" : "status",
			     WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
	}
	stop = 1;
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
}

static void on_signal(int number)
{
	uint8_t buf[64];
	int saved_errno = errno;
	size_t at = (size_t)signals * 77777777 % (size - sizeof(buf));

	(void)number;
	if (pread(shared_fd, buf, sizeof(buf), (off_t)at) != sizeof(buf) || memcmp(buf, saved + at, sizeof(buf)))
		_exit(1);
	signals++;
	errno = saved_errno;
}

static void by_signals(void)
{
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	struct itimerval often = { { 0, 300 }, { 0, 300 } };
	pthread_t thread;

	alarm(0);
	shared_fd = opened(path, O_RDONLY);
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
	pthread_create(&thread, NULL, read_on, (void *)7);
	while (signals < 2000)
		read_all(opened(path, O_RDONLY));
	stop = 1;
	pthread_join(thread, NULL);
}

/* What a collector of another user has open it goes on reading; what it opens, the file's mode decides. */
static void by_another_user(void)
{
	int fd = opened(path, O_RDONLY);

	if (setgid(65534) || setuid(65534))
		err(1, "setuid");
	read_all(fd);
	map_all(fd);
	must(EACCES, "open by another user", open(path, O_RDONLY) < 0);
}

static const struct way {
	const char *name;
	void (*read)(void);
} ways[] = {
	{ "reading", by_reading }, { "stdio", by_stdio }, { "reopening", by_reopening }, { "passing", by_passing },
	{ "copying", by_copying }, { "uring", by_uring }, { "folder", by_folder }, { "mistake", by_mistake },
	{ "moving", by_moving }, { "forking", by_forking }, { "signals", by_signals }, { "user", by_another_user },
};

int main(int argc, char **argv)
{
	struct stat st;
	int fd;

	if (argc != 4)
		errx(2, "usage: reader WAY VMCORE SAVED");
	path = argv[2];
	fd = opened(argv[3], O_RDONLY);
	if (fstat(fd, &st))
		err(1, "%s", argv[3]);
	size = (size_t)st.st_size;
	saved = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
	close(fd);
	for (size_t i = 0; i < sizeof(ways) / sizeof(*ways); i++)
		if (!strcmp(argv[1], ways[i].name)) {
			ways[i].read();
			return 0;
		}
	errx(2, "no such way: %s", argv[1]);
}
