#!/bin/sh
# What vmjob starts as `sys.executable`.
unset LD_LIBRARY_PATH LD_PRELOAD
case $0 in /*) d=${0%/*/*} ;; *) d=$(cd "${0%/*}/.." && pwd) || exit 127 ;; esac
exec "$d/lib/@LOADER@" --library-path "$d/lib" --argv0 "$d/bin/python3" "$d/lib/python" -I -B -X utf8 "$@"
