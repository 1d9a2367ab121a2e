/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The gate for those who ask about very many pages: C programs. Python does not, and has no part in this: what is in
 * guard._core counts in every capture initramfs.
 */
#ifndef OLDMEM_BULK_H
#define OLDMEM_BULK_H

#include "gate.h"

/* True if no rule refuses the page: the same answer, for those who do not ask which. */
bool gate_is_ram(const struct gate *g, uint64_t pfn);

/*
 * The verdicts on [pfn, pfn + n), which must not wrap: bit i % 64 of words[i / 64] is set where page pfn + i is RAM;
 * further bits of the last word are 0. Each rule is walked once, so that this costs far less than n questions.
 */
void gate_fill(const struct gate *g, uint64_t pfn, uint64_t n, uint64_t *words);

#endif
