/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Loading the next kernel and going there: what kexec_file_load(2) and reboot(2) offer. All return 0 or -errno. */
#ifndef OLDMEM_KEXEC_H
#define OLDMEM_KEXEC_H

/*
 * The kernel and initramfs of two descriptors, with the NUL-terminated command line. With `tell` the kernel logs where
 * its segments go (KEXEC_FILE_DEBUG, since 6.8; -EINVAL before).
 */
int kexec_file(int kernel_fd, int initramfs_fd, const char *cmdline, int tell);
/* Forget what is loaded, however it was loaded. */
int kexec_unload(void);
/* Go to what is loaded; returns only if that fails. */
int kexec_jump(void);

#endif
