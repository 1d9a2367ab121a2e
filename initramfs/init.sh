#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# First process of a capture kernel: loads the modules listed, lets oldmem put its vmcore in place, runs the collector, then
# gives a shell. It never reboots: what to do with the machine is for who asked for the dump.

export PATH=/usr/sbin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o mode=0755 tmpfs /run

tell() {
	echo "init: $*"
}

modules=/lib/modules/$(uname -r)
if [ -e "$modules/modules.load" ]; then
	while read -r module; do
		case $module in
		*/virtio_mem.ko)
			# Outside kdump mode (is_kdump_kernel(): a usable elfcorehdr=) the driver starts by unplugging all
			# memory of its device, and what was in it is gone.
			if [ ! -e /proc/vmcore ]; then
				tell "virtio_mem not loaded: without /proc/vmcore it could unplug the old memory"
				continue
			fi
			;;
		esac
		insmod "$modules/$module" || tell "$module does not load"
	done <"$modules/modules.load"
fi

if [ -x /usr/bin/oldmem ]; then
	via=fuse
	[ -e /etc/oldmem-via ] && read -r via </etc/oldmem-via
	oldmem init --via "$via"
	status=$?
	[ "$status" -eq 0 ] || tell "oldmem init ended with status $status"
fi

if [ -e /etc/oldmem-run ]; then
	sh /etc/oldmem-run
	tell "collector ended with status $?"
	if [ -e /run/oldmem/guard.json ]; then
		oldmem "done" || tell "oldmem done ended with status $?: not all of the vmcore could be read"
	fi
fi

# The kernel panics when its first process ends, so a shell that was left is started again.
while :; do
	setsid cttyhack sh
	sleep 1
done
