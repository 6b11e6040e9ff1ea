#!/bin/bash
# Plays dpdk-testpmd for tests: notes its arguments and what it is told beside the link that it is called by; `show port stats`
# has 250,000 frames more each time.
dir=$(dirname "$0")
echo "$*" >> "$dir/args"
case "$*" in *"$(cat "$dir/broken" 2>/dev/null || echo never)"*) echo "EAL: no such driver" >&2; exit 1 ;; esac
side=front; case "$*" in *file-prefix=back*) side=back ;; *file-prefix=switch*) side=switch ;; esac
echo $$ >> "$dir/pids"
frames=1000
printf 'EAL: plays\ntestpmd> '
while read -r line; do
    echo "$line" >> "$dir/told.$side"
    case "$line" in
        "show port info 0") echo "Link status: up" ;;
        "show port stats 0") echo "  RX-packets: $frames     RX-missed: 0"; frames=$((frames + 250000)) ;;
        "set burst 7") echo "Bad arguments" ;;
        "set burst 8") exit 3 ;;
        quit) exit 0 ;;
    esac
    printf 'testpmd> '
done
echo "end of input" >> "$dir/told.$side"
