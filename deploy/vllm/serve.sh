#!/bin/sh
# One vLLM endpoint for several exports: the adapters that `peft export RUN --to vllm -o DIR` wrote, on their base.
#
#   deploy/vllm/serve.sh BASE DIR [DIR ...] [-- further options of vllm serve]
#
# VLLM=echo shows the command instead of running it.
set -eu

[ $# -ge 2 ] || { echo "usage: $0 BASE DIR [DIR ...] [-- options]" >&2; exit 2; }
base=$1
shift
largest=1
modules=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    found=
    for config in "$1"/*/adapter_config.json; do
        [ -f "$config" ] || continue
        folder=$(dirname "$config")
        modules="$modules
$(basename "$folder")=$folder"
        found=yes
    done
    [ -n "$found" ] || { echo "$1 holds no adapter: vLLM cannot serve its method beside others, so the export merged it" >&2; exit 2; }
    rank=$(sed -n 's/.*--max-lora-rank \([0-9][0-9]*\).*/\1/p' "$1/serve.sh")
    [ "${rank:-0}" -le "$largest" ] || largest=$rank
    shift
done
[ $# -eq 0 ] || shift
# One argument a line, so that folders may have spaces in their names.
IFS='
'
set -f
exec ${VLLM:-vllm} serve "$base" --enable-lora --max-lora-rank "$largest" --lora-modules $modules "$@"
