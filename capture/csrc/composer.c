/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "composer.h"

#include <sys/mman.h>

#include "faults.h"
#include "sys.h"

static int map_whole(const struct composer *c, int fd, int prot, void **map, uint64_t *size)
{
	struct stat st;
	int err = 0;

	if (fd < 0)
		return fd;
	if (sys_fstat(fd, &st))
		err = -errno;
	else if (st.st_size < (off_t)sizeof(struct plan))
		err = -EBADMSG;
	if (!err) {
		*size = (uint64_t)st.st_size;
		*map = c->mmap(NULL, *size, prot, MAP_SHARED | MAP_NORESERVE, fd, 0);
		err = *map == MAP_FAILED ? -errno : 0;
	}
	sys_close(fd);
	return err;
}

int composer_open(struct composer *c, const char *path)
{
	char buffer[PROC_FD_PATH];
	void *plan, *tally;
	uint64_t size, tally_size;
	int err = map_whole(c, sys_open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY), PROT_READ, &plan, &size);

	if (err)
		return err;
	c->plan = plan;
	if (c->plan->layout != sizeof(*c->plan) || c->plan->plan_size != size)
		err = -EBADMSG;
	if (!err) {
		path = proc_fd_path(buffer, c->plan->pid, c->plan->tally_fd);
		err = map_whole(c, sys_open(path, O_RDWR | O_CLOEXEC), PROT_READ | PROT_WRITE, &tally, &tally_size);
	}
	if (err) {
		sys_munmap(plan, size);
		return err;
	}
	c->tally = tally;
	return 0;
}

/* Whoever comes second at the same time does it in vain: nobody waits, and nobody is left waiting by a fork. */
static bool take_rules(struct composer *c)
{
	struct guardfile file;
	struct gate *gate, *none = NULL;
	struct gate_rule *rules;
	char why[256];
	size_t room;

	if (guardfile_check(&file, plan_part(c, c->plan->guard), c->plan->guard_size, why, sizeof(why)))
		return false;
	room = sizeof(*gate) + file.n * sizeof(*rules);
	/* not malloc(): a signal handler may read */
	gate = c->mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (gate == MAP_FAILED)
		return false;
	rules = (struct gate_rule *)(gate + 1);
	for (size_t i = 0; i < file.n; i++)
		guardfile_rule(&file, i, rules + i, NULL, NULL);
	*gate = (struct gate){ file.n, rules };
	if (!__atomic_compare_exchange_n((struct gate **)&c->gate, &none, gate, false, __ATOMIC_RELEASE, __ATOMIC_ACQUIRE))
		sys_munmap(gate, room);
	return true;
}

bool composer_ready(struct composer *c)
{
	/* the rules come last: who sees them need not ask for anything before, at each read and mapping */
	return __atomic_load_n(&c->gate, __ATOMIC_ACQUIRE) || (faults_catch(c) && take_rules(c));
}

/*
 * Files of the plan's process, open: to open one by way of /proc costs as much as to map a megabyte. Who uses one takes
 * it out meanwhile: nobody waits for anybody, in no signal handler and in no child of a fork; one that is out is opened
 * once more. A collector may close what it never opened (closefrom(3)), and the number may be another file's then.
 */
enum { KEPT = 8, HIGH_FD = 256 };	/* far from the lowest number, which programs count on */

static int kept[KEPT];	/* one more than the descriptor; 0: none */

static int take(uint64_t file)
{
	return file < KEPT ? __atomic_exchange_n(&kept[file], 0, __ATOMIC_ACQUIRE) - 1 : -1;
}

static void put_back(uint64_t file, int fd)
{
	int none = 0;

	if (file >= KEPT ||
	    !__atomic_compare_exchange_n(&kept[file], &none, fd + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
		sys_close(fd);
}

static int open_file(const struct composer *c, const struct plan_file *file)
{
	char buffer[PROC_FD_PATH];
	/* that process may be another one by now, or in this namespace: nothing that is opened may block */
	int fd = sys_open(proc_fd_path(buffer, c->plan->pid, file->fd), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	long high = fd < 0 ? -1 : syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, HIGH_FD);

	if (high < 0)
		return fd;
	sys_close(fd);
	return (int)high;
}

static bool is_file(int fd, const struct plan_file *file)
{
	struct stat st;

	return !sys_fstat(fd, &st) && st.st_dev == file->dev && st.st_ino == file->ino;
}

void composer_unmap(const struct composer *c, void *at, uint64_t n, int fixed)
{
	if (fixed != MAP_FIXED || c->mmap(at, n, PROT_NONE, COMPOSER_EMPTY | MAP_FIXED, -1, 0) == MAP_FAILED)
		sys_munmap(at, n);
}

void *composer_map(const struct composer *c, void *at, uint64_t n, int fixed, uint64_t index, uint64_t offset, int *err)
{
	const struct plan_file *file = (const struct plan_file *)plan_part(c, c->plan->files) + index;
	int fd = take(index);
	void *map;

	for (bool fresh = false; ; fresh = true) {
		if (fd < 0) {
			fd = open_file(c, file);
			fresh = true;
		}
		if (fd < 0) {
			*err = fd;
			return MAP_FAILED;
		}
		map = c->mmap(at, n, PROT_READ, MAP_SHARED | MAP_NORESERVE | fixed, fd, (off_t)offset);
		*err = map == MAP_FAILED ? -errno : 0;
		/* asked afterwards: what was the file then has been it when it was mapped */
		if (is_file(fd, file)) {
			put_back(index, fd);
			return map;
		}
		if (map != MAP_FAILED)
			composer_unmap(c, map, n, fixed);
		if (fresh) {
			sys_close(fd);
			*err = -ESTALE;
			return MAP_FAILED;
		}
		fd = -1;	/* the collector's own by now */
	}
}
