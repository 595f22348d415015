#!/bin/sh
# Puts a Linux kernel and the modules that tests need into a directory, for tests in a small virtual
# machine: the running kernel need not have NBD. Nothing is installed.
#
#   contrib/test-kernel.sh DIRECTORY
#
# The kernel is Debian's for clouds (amd64). Quick when it is there already. Where it cannot be had
# this says so and exits 0: those tests are skipped then, with a reason.
set -eu

target=$1
meta=linux-image-cloud-amd64
modules='
    kernel/drivers/block/nbd.ko
    kernel/drivers/block/virtio_blk.ko
    kernel/drivers/char/virtio_console.ko
    kernel/drivers/net/net_failover.ko
    kernel/drivers/net/virtio_net.ko
    kernel/drivers/virtio/virtio.ko
    kernel/drivers/virtio/virtio_pci.ko
    kernel/drivers/virtio/virtio_pci_legacy_dev.ko
    kernel/drivers/virtio/virtio_pci_modern_dev.ko
    kernel/drivers/virtio/virtio_ring.ko
    kernel/net/core/failover.ko'

give_up() {
    echo "setup: no kernel for tests in a virtual machine: $*" >&2
    exit 0
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

kernel_package() { # the package that holds the newest kernel known to apt
    apt-cache depends $meta 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1
}

complete() {
    [ -e "$target/vmlinuz" ] || return 1
    for module in $modules; do [ -e "$target/${module##*/}" ] || return 1; done
}

! complete || exit 0
[ "$(uname -m)" = x86_64 ] || give_up "this is $(uname -m), the tests know only x86_64"
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || give_up "needs apt"

package=$(kernel_package)
if [ -z "$package" ]; then
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null >/dev/null 2>&1 || true
    package=$(kernel_package)
fi
[ -n "$package" ] || give_up "apt knows no $meta"

echo "setup: fetching $package for tests in a virtual machine"
rm -rf "$target"
mkdir -p "$target.new/root"
trap 'rm -rf "$target.new"' EXIT
download() { (cd "$target.new" && apt-get -qq download "$package" </dev/null 2>&1); }
if ! download >/dev/null; then
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null >/dev/null 2>&1 || true
    package=$(kernel_package)
    said=$(download) || give_up "apt-get download $package: $said"
fi
dpkg-deb -x "$target.new"/*.deb "$target.new/root" || give_up "$package cannot be unpacked"
for module in $modules; do
    mv "$target.new"/root/lib/modules/*/"$module" "$target.new/" 2>/dev/null ||
        give_up "$package has no $module"
done
# Last: it says that all is there.
mv "$target.new"/root/boot/vmlinuz-* "$target.new/vmlinuz"
rm -rf "$target.new"/root "$target.new"/*.deb
mv "$target.new" "$target"
