#!/bin/bash
# One node's part of staging: copies the files that MMSSL_STAGE names to the folder $1.  slurm/common.sh runs it.
# A file that is there with the same size and time is kept, and a copy appears under its name only when whole.  Told to
# stop, it leaves with 75.
set -eu -o pipefail
mkdir -p "$1"
begin=$SECONDS copied=0 kept=0
shopt -s nullglob
# shellcheck disable=SC2206  # to be split and expanded: it holds patterns
files=($MMSSL_STAGE)
[ ${#files[@]} -gt 0 ] || { echo "mmssl: error: MMSSL_STAGE=$MMSSL_STAGE names no file on $(hostname)" >&2; exit 2; }
declare -A from
for file in "${files[@]}"; do
  name=${file##*/}
  if [ "${from[$name]:-$file}" != "$file" ]; then
    echo "mmssl: error: MMSSL_STAGE names two files $name, ${from[$name]} and $file; copies cannot both have that name" >&2
    exit 2
  fi
  from[$name]=$file
done
part="" copying=""
tidy() { [ -z "$copying" ] || kill "$copying" 2>/dev/null || true; [ -z "$part" ] || rm -f "$part"; }
trap tidy EXIT  # a disk that is full keeps no half copy
trap 'exit 75' TERM USR2
for file in "${files[@]}"; do
  target=$1/${file##*/}
  if [ -f "$target" ] && [ "$(stat -Lc '%s %Y' "$file")" = "$(stat -c '%s %Y' "$target")" ]; then
    kept=$((kept + 1))
    continue
  fi
  part=$target.$SLURM_JOB_ID.part
  cp -L --preserve=timestamps "$file" "$part" &
  copying=$!
  wait "$copying"  # unlike cp in the foreground it is broken off by a signal
  mv -f "$part" "$target"
  copied=$((copied + 1))
  part="" copying=""
done
echo "mmssl: staged on $(hostname) in $1: $copied files copied, $kept there already, $((SECONDS - begin)) s"
