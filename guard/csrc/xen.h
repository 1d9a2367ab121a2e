/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Asking Xen, page by page, what stands behind a page of this HVM guest: HVMOP_get_mem_type through /dev/xen/privcmd,
 * as arch/x86/xen/mmu_hvm.c asks. Layouts: include/uapi/xen/privcmd.h, include/xen/interface/hvm/hvm_op.h.
 */
#ifndef OLDMEM_XEN_H
#define OLDMEM_XEN_H

#include <stddef.h>
#include <stdint.h>

/*
 * Ask about the n pages from pfn on, and set bit i (bit 0 of byte 0 first) of `refused` where an access to the i-th
 * goes to the device model: there is no memory behind it. Returns how many questions failed, whose bits stay as they
 * are; *error is the errno of the first of them.
 */
uint64_t xen_mem_types(int fd, uint64_t pfn, uint64_t n, uint8_t *refused, int *error);

#endif
