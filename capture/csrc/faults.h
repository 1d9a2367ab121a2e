/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is mapped stays safe to touch: a page of old memory that cannot be delivered (SIGBUS: a file that is too short,
 * broken memory) becomes a zero page and a mark in the tally. What is ours the kernel's books tell at that moment, so
 * that nothing about mappings is remembered that munmap(2), mremap(2), MAP_FIXED or fork(2) could make untrue.
 */
#ifndef OLDMEM_FAULTS_H
#define OLDMEM_FAULTS_H

#include "composer.h"

/* True once SIGBUS is caught, for this composer; any number of threads and signal handlers may call it. */
bool faults_catch(const struct composer *c);

/*
 * May what is mapped at the address be of a composed vmcore: old memory, header, or zero pages? The last look like any
 * memory of nobody's that can only be read.
 */
bool faults_of_vmcore(const struct composer *c, uintptr_t at);

#endif
