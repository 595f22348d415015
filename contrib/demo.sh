#!/bin/bash
# A tour of backyfs in a temporary directory, run by `make demo`; leaves nothing behind.
#
# Makes the disk of a small virtual machine (a GPT with an ext4 partition), backs it up, changes
# it, backs it up again, and gets the old state back: a file, and the disk.
set -euo pipefail

project=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$project/.venv/bin:$PATH:/usr/sbin:/sbin"
unset BACKYFS_BACKUP_DIR BACKYFS_CONFIG
tour=$(mktemp -d --suffix=-backyfs-demo)
cd "$tour"

cleanup() {
    if mountpoint -q "$tour/mnt"; then
        backyfs umount mnt 2>/dev/null || fusermount3 -uz mnt || umount -l mnt
    fi
    cd /
    rm -rf "$tour"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -t 1 ]; then
    bold=$(printf '\033[1m') plain=$(printf '\033[0m')
else
    bold='' plain=''
fi
step=0
heading() { step=$((step + 1)); printf '\n%s%d. %s%s\n\n' "$bold" $step "$*" "$plain"; }
run() { # show a command as typed, then do it (without the version line that debugfs prints)
    printf '%s$ %s%s\n' "$bold" "$1" "$plain"
    eval "$1" 2>&1 | sed -E '/^debugfs [0-9]/d; /^$/d'
}
same() { # CHECKSUM-LINE CHECKSUM-LINE WHAT
    [ "${1%% *}" = "${2%% *}" ] || { echo "demo: $3 differs" >&2; exit 1; }
    echo "→ the same checksum: $3"
}

printf '%sbackyfs: a tour%s (in %s, removed at the end)\n' "$bold" "$plain" "$tour"

heading "The disk of a virtual machine: a partition table and a file system with files in it"
mkdir -p root/etc root/var/www root/var/lib/orders vms mnt
echo 'Welcome to web01.' >root/etc/motd
cp "$project/LICENSE" original.txt
cp original.txt root/var/www/licence.txt
head -c 64M /dev/urandom >root/var/lib/orders/orders.db
run "truncate -s 512M vms/web01.img"
run "echo 'size=500M, type=linux, name=root' | sfdisk -q --label gpt vms/web01.img"
run "mkfs.ext4 -q -L root -d root -E offset=1048576 vms/web01.img 500M"
rm -r root

heading "A repository for it, and the first backup"
run "backyfs -b srv/web01 init file vms/web01.img"
run "backyfs -b srv/web01 backup daily"
before=$(sha256sum vms/web01.img)

heading "The machine goes on: somebody spoils a file, new orders come in"
echo 'All your base.' >motd
head -c 1M /dev/urandom >new.db
guest="'vms/web01.img?offset=1048576'"
run "debugfs -w -R 'rm /etc/motd' $guest"
run "debugfs -w -R 'write motd /etc/motd' $guest"
run "debugfs -w -R 'write new.db /var/lib/orders/new.db' $guest"

heading "The second backup stores what changed"
run "backyfs -b srv/web01 backup daily manual:before-upgrade"
after=$(sha256sum vms/web01.img)
run "backyfs -b srv/web01 status"
run "du -sh --apparent-size vms/web01.img; du -sh srv/web01"
run "backyfs -b srv/web01 verify -r all"

if [ -r /dev/fuse ] && command -v fusermount3 >/dev/null; then
    heading "All revisions of all machines as a tree of files"
    run "backyfs -b srv mount mnt"
    run "ls -l mnt/web01"
    run "ls -lhs mnt/web01/latest/"
    first=$(backyfs -b srv/web01 find -r 'first(all)' | sed 's|.*/||; s|\.json$||')

    heading "Copy the newest image out: it is the disk, byte for byte"
    run "cp --sparse=always mnt/web01/latest/disk.img copy.img"
    run "sha256sum vms/web01.img copy.img"
    same "$after" "$(sha256sum copy.img)" "vms/web01.img and the copy of the newest revision"

    heading "Get one file back, as it was before"
    run "debugfs -R 'cat /etc/motd' 'mnt/web01/latest/disk.img?offset=1048576'"
    run "debugfs -R 'cat /etc/motd' 'mnt/web01/$first/disk.img?offset=1048576'"
    run "debugfs -R 'dump /var/www/licence.txt licence.txt' 'mnt/web01/$first/disk.img?offset=1048576'"
    run "sha256sum original.txt licence.txt"
    same "$(sha256sum original.txt)" "$(sha256sum licence.txt)" "the file and what was put into the machine"
    run "backyfs umount mnt"
else
    heading "The mounted tree is left out: no access to /dev/fuse"
fi

heading "Get the whole machine back, as it was before"
run "backyfs -b srv/web01 restore -r first restored.img"
run "sha256sum restored.img"
same "$before" "$(sha256sum restored.img)" "the disk at the time of the first backup"

printf '\n%sThat was it.%s Your own: backyfs -b DIR init file IMAGE; see README.md.\n' "$bold" "$plain"
