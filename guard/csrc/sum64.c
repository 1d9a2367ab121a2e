/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "sum64.h"

#define P1 UINT64_C(0x9E3779B185EBCA87)
#define P2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define P3 UINT64_C(0x165667B19E3779F9)
#define P4 UINT64_C(0x85EBCA77C2B2AE63)

static uint64_t rotate(uint64_t x, int by)
{
	return x << by | x >> (64 - by);
}

static uint64_t mix(uint64_t lane, uint64_t word)
{
	return rotate(lane + word * P2, 31) * P1;
}

void sum64_begin(struct sum64 *s)
{
	*s = (struct sum64){ .lane = { P1 + P2, P2, 0, -P1 } };
}

static uint64_t little_endian(const uint64_t *word)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	return __builtin_bswap64(*word);
#else
	return *word;
#endif
}

void sum64_add(struct sum64 *s, const uint64_t *words, uint64_t size)
{
	uint64_t a = s->lane[0], b = s->lane[1], c = s->lane[2], d = s->lane[3];

	for (uint64_t i = 0; i < size / 8; i += 4) {
		a = mix(a, little_endian(words + i));
		b = mix(b, little_endian(words + i + 1));
		c = mix(c, little_endian(words + i + 2));
		d = mix(d, little_endian(words + i + 3));
	}
	*s = (struct sum64){ .lane = { a, b, c, d }, .size = s->size + size };
}

uint64_t sum64_end(const struct sum64 *s)
{
	const uint64_t *lane = s->lane;
	uint64_t x = rotate(lane[0], 1) + rotate(lane[1], 7) + rotate(lane[2], 12) + rotate(lane[3], 18);

	for (int i = 0; i < 4; i++)
		x = (x ^ mix(0, lane[i])) * P1 + P4;
	x += s->size;
	x = (x ^ x >> 33) * P2;
	x = (x ^ x >> 29) * P3;
	return x ^ x >> 32;
}
