#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# dracut module: oldmem in the kdump initramfs. Checked with shellcheck and by calling install() with dracut 059's
# inst_simple on an empty folder; never in a whole dracut run.
# Installed as /usr/lib/dracut/modules.d/55oldmem, with oldmem.service beside this file.
# shellcheck disable=SC2154  # initdir, moddir, systemdsystemunitdir are dracut's

check() {
	# kdump's builders (mkdumprd) set this; an ordinary initramfs has no use for oldmem.
	[[ -n ${IN_KDUMP-} ]] || return 1
	require_binaries python3 || return 1
	return 0
}

depends() {
	echo systemd-initrd
}

installkernel() {
	# Not virtio_mem: oldmem asks the devices itself, and outside kdump mode that driver destroys what is to be saved.
	hostonly='' instmods fuse
}

install() {
	local stage list image source
	stage=$(mktemp -d "${DRACUT_TMPDIR:-/var/tmp}/oldmem.XXXXXX") || return 1
	list=$(python3 -m initramfs --list-files "$stage") || return 1
	while IFS=$'\t' read -r image source; do
		inst_simple "$source" "$image" || return 1
	done <<<"$list"
	# dracut deletes DRACUT_TMPDIR at its end; older ones, which do not set it, have copied the files by now.
	rm -rf -- "$stage"
	inst_simple "$moddir/oldmem.service" "$systemdsystemunitdir/oldmem.service"
	"${SYSTEMCTL:-systemctl}" -q --root "$initdir" add-wants initrd.target oldmem.service
}
