#!/bin/bash
# Carries out the steps of a Dockerfile in clean Debian roots, for machines without a container engine, then runs
# the health check and "pathopipe demo" there as the image's user. Needs root, debootstrap, unshare and python3.
#
# usage: test_in_chroot.sh FOLDER [--dockerfile FILE] [--build-arg NAME=VALUE]... [--mirror URL] [--show DIR]... [--keep]
#
#   FOLDER         work space of some GiB; the bare Debian stays in FOLDER/base for the next time
#   --build-arg    as in docker build; TORCH_INDEX names another package index
#   --show DIR     a folder of this machine that the steps may read, such as local wheels
#   --keep         leave the stages in FOLDER/stages
#
# What pip is told here through PIP_* variables holds for the steps, too.
set -euo pipefail

if [ -z "${IN_OWN_MOUNTS:-}" ]; then
    # Mounts made in a name space of our own are gone when this ends, however it ends.
    IN_OWN_MOUNTS=1 exec unshare --mount --propagation private -- "$0" "$@"
fi

say() { printf '== %s\n' "$*"; }
fail() { printf 'test_in_chroot: %s\n' "$*" >&2; exit 1; }

here="$(cd "$(dirname "$0")" && pwd)"
context="$(dirname "$here")"
dockerfile="$here/Dockerfile"
mirror=http://deb.debian.org/debian
keep=
declare -A given=() args=() env=()
shown=()
[ $# -ge 1 ] || fail "name a folder to work in"
work="$(mkdir -p "$1" && cd "$1" && pwd)"
shift
while [ $# -gt 0 ]; do
    case "$1" in
        --dockerfile) dockerfile="$2"; shift 2 ;;
        --build-arg) given["${2%%=*}"]="${2#*=}"; shift 2 ;;
        --mirror) mirror="$2"; shift 2 ;;
        --show) shown+=("$2"); shift 2 ;;
        --keep) keep=1; shift ;;
        *) fail "unknown option $1" ;;
    esac
done
[ "$(id -u)" = 0 ] || fail "chroot needs root"
command -v debootstrap > /dev/null || fail "debootstrap is missing; apt-get install debootstrap"

make_base() {
    # Stands for python:3.11-slim-bookworm: the same Debian and the same minor Python, which there is at /usr/local/bin.
    [ -e "$work/base/.made" ] && return
    say "debootstrap"
    rm -rf "$work/base"
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/base" "$mirror" \
        > "$work/debootstrap.log" 2>&1 || fail "debootstrap failed; see $work/debootstrap.log"
    chroot "$work/base" python3 -m venv /usr/local
    rm -rf "$work/base/var/cache/apt/archives"/*.deb
    touch "$work/base/.made"
}

root= cwd=/ user=0:0 stage_count=0 entrypoint=() healthcheck=()

inside() { # runs a command in the present root, with the stage's variables and folder, as user $1
    local who="$1" name
    shift
    local vars=()
    for name in "${!env[@]}"; do vars+=("$name=${env[$name]}"); done
    chroot --userspec="$who" "$root" /usr/bin/env -i "${vars[@]}" /bin/sh -c 'cd "$0" && exec "$@"' "$cwd" "$@"
}

expand() { # $NAME and ${NAME} of a Dockerfile
    local text="$1" name
    for name in "${!env[@]}"; do text="${text//\$\{$name\}/${env[$name]}}"; text="${text//\$$name/${env[$name]}}"; done
    printf '%s' "$text"
}

mount_system() {
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    local folder
    for folder in "${shown[@]}"; do
        mkdir -p "$root$folder"
        mount --bind -o ro "$folder" "$root$folder"
    done
    # The net, as this machine reaches it: names, and the authorities that it trusts.
    cp --dereference /etc/resolv.conf /etc/hosts "$root/etc/"
    mkdir -p "$root/etc/ssl/certs"
    cp --dereference /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
}

unmount_system() {
    local folder
    [ -n "$root" ] || return 0
    for folder in "${shown[@]}"; do umount "$root$folder"; done
    umount --recursive "$root/dev"
    umount "$root/proc"
}

step_arg() {
    local name="${1%%=*}"
    args["$name"]="${given[$name]:-${1#*=}}"
    env["$name"]="${args[$name]}"
}

step_from() {
    unmount_system
    stage_count=$((stage_count + 1))
    say "stage $stage_count${3:+ ($3)}: FROM $1"
    root="$work/stages/${3:-final}"
    mkdir -p "$root"
    cp -a "$work/base/." "$root/"
    env=() cwd=/ user=0:0
    env[PATH]=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
    env[HOME]=/root
    local name
    for name in "${!PIP_@}"; do env["$name"]="${!name}"; done
    mount_system
}

step_env() { env["$1"]="$(expand "$2")"; }
step_workdir() { cwd="$1"; mkdir -p "$root$cwd"; }
step_user() { user="$1"; }
step_entrypoint() { entrypoint=("$@"); }
step_healthcheck() { healthcheck=("$@"); }

step_run() {
    say "RUN $1"
    inside "$user" /bin/sh -c "$1"
}

step_copy() { # FROM-STAGE SOURCE... TARGET
    local from="$1" target="${*: -1}" source
    say "COPY ${*:2}${from:+ from $from}"
    case "$target" in /*) ;; *) target="$cwd/$target" ;; esac
    for source in "${@:2:$#-2}"; do
        if [ -n "$from" ]; then source="$work/stages/$from/${source#/}"; else source="$context/$source"; fi
        if [ -d "$source" ]; then
            mkdir -p "$root$target"
            tar -C "$source" --exclude=__pycache__ -c . | tar -C "$root$target" --no-same-owner -x
        else
            cp "$source" "$root$target"
        fi
    done
}

make_base
rm -rf "$work/stages"
calls="$(python3 "$here/dockerfile_steps.py" "$dockerfile")"
while IFS= read -r call <&3; do eval "$call"; done 3<<< "$calls"

say "the image"
[ "${user%%:*}" != 0 ] || fail "the image's user is root"
for tool in gcc cc g++ make ld pip git; do
    if found="$(inside "$user" /bin/sh -c "command -v $tool")" && [ "$tool" != pip ]; then fail "$tool is in it: $found"; fi
done
[ ! -e "$root/opt/pathopipe/bin/pip" ] || fail "pip is in the environment"
writable="$(inside "$user" find /opt/pathopipe -writable ! -type l -print -quit)"
[ -z "$writable" ] || fail "its user may write $writable"
printf 'environment %s, Debian and Python %s\n' \
    "$(du -sh "$root/opt/pathopipe" | cut -f1)" "$(du -sh "$work/base" | cut -f1)"
du -sm "$root"/opt/pathopipe/lib/python3*/site-packages/* | sort -rn | head -n 8 | sed "s|$root/opt/pathopipe/lib/||"

say "pinned: every installed package stands in constraints.txt"
inside "$user" python -c 'import importlib.metadata as m
for d in m.distributions(): print(d.name, d.version.partition("+")[0], sep="==")' \
    | grep -v '^pathopipe==' | sort -f > "$work/installed.txt"
python3 - "$context/constraints.txt" "$work/installed.txt" <<'PYTHON'
import re, sys
def read(path):
    pairs = (line.strip().split("==") for line in open(path))
    return {f"{re.sub('[-_.]+', '-', name).lower()}=={version}" for name, version in pairs}
pins, found = map(read, sys.argv[1:])
loose = sorted(found - pins)
print(f"{len(found & pins)} of {len(found)} are; not pinned: {', '.join(loose) or 'none'}")
PYTHON

say "HEALTHCHECK as $user: ${healthcheck[*]}"
inside "$user" "${healthcheck[@]}"
say "${entrypoint[*]} demo as $user"
inside "$user" "${entrypoint[@]}" demo --out /work/demo
inside "$user" "${entrypoint[@]}" verify /work/demo
unmount_system
root=
[ -n "$keep" ] || rm -rf "$work/stages"
say "all steps ran"
