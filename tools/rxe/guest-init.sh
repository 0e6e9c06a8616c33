#!/bin/busybox sh
# First program of the guest, from the initramfs: loads modules, shares the host's files, makes the device,
# then becomes the agent. What it prints goes to the serial console; the host shows it when a start fails.

/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin:/usr/bin:/sbin
fail() { echo "guest: $*"; reboot -f; }

mount -t devtmpfs dev /dev && mount -t proc proc /proc && mount -t sysfs sys /sys || fail "no kernel file systems"
echo "guest: kernel $(uname -r) is up"
while read -r module options; do
    # shellcheck disable=SC2086
    insmod "/modules/$module" $options || fail "module $module does not load"
done </modules.order

# The host's root below an overlay: all writes stay in memory, except in the shared directories.
case $(cat /job/filesystem) in
    virtiofs) mount -t virtiofs host /lower ;;
    *) mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose host /lower ;;
esac || fail "cannot mount the host's files"
mount -t tmpfs -o mode=755,size=75% upper /upper && mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /root || fail "no overlay"
echo "guest: root is mounted"

for name in dev proc sys; do mkdir -p /root/$name && mount --move /$name /root/$name; done
mkdir -p /root/run /root/dev/pts /root/dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t tmpfs -o mode=755 run /root/run
ln -s /proc/self/fd /root/dev/fd
ln -s fd/0 /root/dev/stdin && ln -s fd/1 /root/dev/stdout && ln -s fd/2 /root/dev/stderr
while IFS= read -r directory; do
    mkdir -p "/root$directory" && mount --bind "/lower$directory" "/root$directory" || fail "cannot share $directory"
done </job/shared
modules=/root/lib/modules/$(uname -r)
mkdir -p "$modules" && mount --bind "/lower$(cat /job/modules)" "$modules"
mount -o remount,bind,ro /lower

hostname localhost
echo 0 >/root/proc/sys/net/ipv6/conf/all/accept_dad
in_root() { chroot /root /usr/bin/env "$@" || fail "failed: $*"; }
in_root ip link set lo up
in_root ip link add aiordma0 type dummy
in_root ip address add 10.71.0.1/24 dev aiordma0
in_root ip address add fd71::1/64 dev aiordma0 nodad
in_root ip link set aiordma0 up
in_root rdma link add rxe0 type rxe netdev aiordma0

# The port, its addresses' GIDs and the device nodes appear a moment later.
port=/root/sys/class/infiniband/rxe0/ports/1
ready() {
    grep -q ACTIVE $port/state && [ -c /root/dev/infiniband/uverbs0 ] && [ -c /root/dev/infiniband/rdma_cm ] &&
        cat $port/gids/[0-7] | grep -q 'ffff:0a47:0001' && cat $port/gids/[0-7] | grep -q '^fd71:.*:0001'
} 2>/dev/null
tries=0
until ready; do
    tries=$((tries + 1))
    [ $tries -gt 600 ] && fail "rxe0 is not active: $(cat $port/state)"
    usleep 50000
done
chmod 666 /root/dev/infiniband/*
echo "guest: rxe0 is active"

mkdir /root/run/aiordma && cp /job/agent.py /root/run/aiordma/agent.py
exec switch_root /root "$(cat /job/python)" -I -S /run/aiordma/agent.py
