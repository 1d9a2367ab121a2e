/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "kexec.h"

#include <errno.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef KEXEC_FILE_DEBUG
#define KEXEC_FILE_DEBUG 0x00000008
#endif

static int file_load(int kernel_fd, int initramfs_fd, const char *cmdline, unsigned long flags)
{
	long n = cmdline ? (long)strlen(cmdline) + 1 : 0;

	return syscall(SYS_kexec_file_load, kernel_fd, initramfs_fd, n, cmdline, flags) ? -errno : 0;
}

int kexec_file(int kernel_fd, int initramfs_fd, const char *cmdline, int tell)
{
	return file_load(kernel_fd, initramfs_fd, cmdline, tell ? KEXEC_FILE_DEBUG : 0);
}

int kexec_unload(void)
{
	return file_load(-1, -1, NULL, KEXEC_FILE_UNLOAD);
}

int kexec_jump(void)
{
	reboot((int)LINUX_REBOOT_CMD_KEXEC);
	return -errno;
}
