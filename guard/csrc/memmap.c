/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "memmap.h"

#include <string.h>

static uint64_t load64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static uint32_t load32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

bool memmap_scan(const struct memmap_shape *shape, const void *pages, size_t n, uint8_t *poisoned, uint8_t *offline)
{
	const struct memmap_shape s = *shape;
	const uint8_t *page = pages;
	bool any = false;

	for (size_t i = 0; i < n; i++, page += s.size) {
		uint8_t bit = (uint8_t)(1 << i % 8);

		if (load64(page + s.flags) & s.poison) {
			poisoned[i / 8] |= bit;
			any = true;
		}
		if (s.offline_mask && (load32(page + s.type) & s.offline_mask) == s.offline && !(load64(page + s.head) & 1)) {
			offline[i / 8] |= bit;
			any = true;
		}
	}
	return any;
}
