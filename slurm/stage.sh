#!/bin/bash
# One node's part of staging: copies the files that MMSSL_STAGE names to the folder $1.  slurm/common.sh runs it.
# A file that is there with the same size and no older time is kept, and a copy appears under its name only when whole.
set -eu -o pipefail
mkdir -p "$1"
begin=$SECONDS copied=0 kept=0
shopt -s nullglob
# shellcheck disable=SC2206  # to be split and expanded: it holds patterns
files=($MMSSL_STAGE)
[ ${#files[@]} -gt 0 ] || { echo "mmssl: error: MMSSL_STAGE=$MMSSL_STAGE names no file on $(hostname)" >&2; exit 2; }
for file in "${files[@]}"; do
  target=$1/$(basename "$file")
  if [ -f "$target" ] && [ "$(stat -Lc %s "$file")" = "$(stat -c %s "$target")" ] && ! [ "$file" -nt "$target" ]; then
    kept=$((kept + 1))
    continue
  fi
  part=$target.$SLURM_JOB_ID.part
  trap 'rm -f "$part"' EXIT  # a disk that is full keeps no half copy
  cp -L --preserve=timestamps "$file" "$part"
  mv -f "$part" "$target"
  copied=$((copied + 1))
done
trap - EXIT
echo "mmssl: staged on $(hostname) in $1: $copied files copied, $kept there already, $((SECONDS - begin)) s"
