#!/bin/sh
# First process of the guest: kernel file systems, modules, then the script. The disk is the host's, read
# only; what can be written is memory, and the folder for results, which is mounted from the host again.
STAGE="$(dirname "$0")"
export PATH=/run/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/run
mount -t proc none /proc
mount -t sysfs none /sys
mount -t tmpfs none /run
mkdir -p /run/out /run/bin /run/mods/lib/modules
mount -t hostfs none /run/out -o "$STAGE/out"
exec >/run/out/log 2>&1
ln -s "/usr/lib/uml/modules/$(uname -r)" /run/mods/lib/modules/
printf '#!/bin/sh\nexec /usr/sbin/modprobe -d /run/mods "$@"\n' >/run/modprobe
chmod +x /run/modprobe
# For those who call it by name, as the product does.
ln -s /run/modprobe /run/bin/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe
export PYTHONPATH="$STAGE/site" PYTHONDONTWRITEBYTECODE=1
/usr/bin/python3 -m tests.uml.inside.main /run/out $(cat "$STAGE/groups")
echo "exit status $?"
poweroff --force --no-wtmp
