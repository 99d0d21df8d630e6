#!/bin/sh
# vmjob @VERSION@ for Linux on x86-64, in one file: this script, and behind it a tar.gz with Python,
# its libraries and vmjob. The first start unpacks it; see what is in it without running it:
#   tail -c +@NEXT@ FILE | tar -tz

# The BOINC client puts the job's directory into it, where a job may write; nothing here needs it.
unset LD_LIBRARY_PATH LD_PRELOAD

name=wrapper-@HASH@
self=$0
[ -h "$self" ] && self=$(readlink -f "$self")
case $self in */*) ;; *) self=./$self ;; esac
# As an application's main program it has such a name, and the client gives it the job's words only.
case ${0##*/} in *_wrapper_* | *_wrapper) set -- wrapper "$@" ;; esac

die() {
  echo "vmjob: $1 [$2]" >&2
  echo "       $3" >&2
  exit @FAILED@
}

# Another user's directory may hold another's program. Not every sh knows who we are, but for -O.
trusted() {
  [ -O "$1" ] && return
  set -- $(ls -ldn "$1")
  [ "$3" = 0 ]
}

# Become vmjob, if it is unpacked in the directory $1. The process stays the same: the BOINC client
# watches it.
start() {
  place=$1/$name
  shift
  if [ -f "$place/whole" ] && trusted "$place"; then
    exec "$place/lib/@LOADER@" --library-path "$place/lib" --argv0 "$place/bin/python3" \
      "$place/lib/python" -I -B -X utf8 "$place/bin/vmjob" "$@"
  fi
}

# Unpack below the directory $1: into a directory of this process, which Python then checks and
# renames. False when this place will not do; `why` says why.
unpack() {
  why="cannot write to $1, or it belongs to another user"
  mkdir -p "$1" 2> /dev/null && [ -w "$1" ] && trusted "$1" || return
  draft=$1/.$name.$$
  rm -rf "$draft"
  mkdir "$draft" 2> /dev/null || return
  trap 'rm -rf "$draft"' EXIT
  trap 'exit 143' HUP INT TERM
  tail -c +@NEXT@ "$self" | { gzip -dc 2> /dev/null && : > "$draft/.good"; } |
    (umask 022 && tar -xof - -C "$draft" 2> "$draft/.said")
  if [ $? != 0 ] || [ ! -f "$draft/.good" ]; then
    tail -c +@NEXT@ "$self" | gzip -t 2> /dev/null || damaged
    why="cannot unpack in $1: $(tail -n 1 "$draft/.said")"
  elif "$draft/bin/python3" "$draft/settle.py" "$self" @SKIP@ @SHA256@ "$draft" "$1/$name"; then
    trap - EXIT HUP INT TERM
    return 0
  elif [ $? = @DAMAGED@ ]; then
    damaged
  else
    why="programs in $1 do not run"
  fi
  rm -rf "$draft"
  trap - EXIT HUP INT TERM
  return 1
}

damaged() {
  die "the file $0 is damaged" archive-damaged "Get it again; under BOINC, reset the project."
}

beside=$(cd "${self%/*}" && pwd -P)/vmjob/programs
cache=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
case ${VMJOB_BUNDLE:-} in
  '') second=${cache:+$cache/vmjob} ;;
  /*) beside=$VMJOB_BUNDLE second= ;;
  *) beside=$PWD/$VMJOB_BUNDLE second= ;;
esac
start "$beside" "$@"
[ -z "$second" ] || start "$second" "$@"

for program in gzip tar tail; do
  command -v $program > /dev/null ||
    die "this computer has no program $program" program-missing "Install it."
done
if unpack "$beside"; then
  start "$beside" "$@"
elif [ -n "$second" ] && unpack "$second"; then
  start "$second" "$@"
fi
die "$why" home-unusable "Set VMJOB_BUNDLE to a directory that you own and may write to."
