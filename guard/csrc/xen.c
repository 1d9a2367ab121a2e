/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "xen.h"

#include <errno.h>
#include <sys/ioctl.h>

#define HYPERVISOR_HVM_OP 34
#define HVMOP_GET_MEM_TYPE 15
#define DOMID_SELF 0x7ff0
#define HVMMEM_MMIO_DM 2

struct privcmd_hypercall {
	uint64_t op;
	uint64_t arg[5];
};

#define IOCTL_PRIVCMD_HYPERCALL _IOC(_IOC_NONE, 'P', 0, sizeof(struct privcmd_hypercall))

struct hvm_get_mem_type {
	uint16_t domid;
	uint16_t mem_type;	/* the answer */
	uint16_t pad[2];
	uint64_t pfn;
};

uint64_t xen_mem_types(int fd, uint64_t pfn, uint64_t n, uint8_t *refused, int *error)
{
	uint64_t failed = 0;

	for (uint64_t i = 0; i < n; i++) {
		/* written anew each time, on the stack: the hypervisor needs it present, and fails if it is not */
		struct hvm_get_mem_type asked = { .domid = DOMID_SELF, .pfn = pfn + i };
		struct privcmd_hypercall call = {
			.op = HYPERVISOR_HVM_OP,
			.arg = { HVMOP_GET_MEM_TYPE, (uintptr_t)&asked },
		};

		if (ioctl(fd, IOCTL_PRIVCMD_HYPERCALL, &call)) {
			if (!failed++)
				*error = errno;
		} else if (asked.mem_type == HVMMEM_MMIO_DM) {
			refused[i / 8] |= (uint8_t)(1 << i % 8);
		}
	}
	return failed;
}
