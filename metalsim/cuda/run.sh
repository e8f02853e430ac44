#!/bin/sh
# The Metal kernels on this machine's NVIDIA GPU: metalsim/cuda/run.sh [FOLDER]
# The same text as on a Mac, compiled by nvcc. Runs the case list, tiles, random problems, long sequences against the
# CPU backend, and compute-sanitizer's four tools; ends with a summary and N passed, N failed. Needs gcc, cmake, nvcc
# and a GPU; takes a few minutes on 16 cores. Logs stay in FOLDER (build/cuda).
set -u
cd "$(dirname "$0")/../.." || exit 1
out=${1:-build/cuda}
rm -rf "$out/objects"
mkdir -p "$out/objects" "$out/logs" "$out/programs"
out=$(cd "$out" && pwd)
cores=$(getconf _NPROCESSORS_ONLN)
cuda=${CUDA_HOME:-/usr/local/cuda}
PATH=$PATH:$cuda/bin
MFA_CACHE=$out/programs
export PATH MFA_CACHE
passed=0
failed=0
began=$(date +%s)

since() {
    echo $(($(date +%s) - began))
}

# --- Build -----------------------------------------------------------------------------------------

# compile FLAGS FILE...: objects named after the whole path; four flags at most are the file's own
compile() {
    flags=$1
    shift
    for file in "$@"; do
        object=$out/objects/$(echo "$file" | tr / _).o
        echo "gcc -std=gnu11 -O2 -fPIC -Iinclude -Isrc -Itests -I. -I$cuda/include $flags -c $file -o $object"
    done
}

build() {
    names=$(cd src && echo core/args.h core/codes.h core/operands.inc core/philox.h metal/kernels/*.h \
        metal/kernels/*.metal)
    names=$(echo "$names" | tr ' ' ';')
    cmake "-DOUTPUT=$out/sources.inc" "-DFOLDER=$PWD/src" "-DNAMES=$names" -P tools/embed.cmake || return 1
    fast="-O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    avx2="-mavx2 -mfma -mf16c"
    avx512="-mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512"
    {
        compile "" src/*.c src/base/*.c src/core/*.c src/cpu/*.c
        for file in src/metal/*.c; do
            [ "$file" = src/metal/source.c ] || compile "" "$file"
        done
        compile "-DMFA_METAL_SOURCES='\"$out/sources.inc\"'" src/metal/source.c
        for file in src/cpu/kernels/*.c; do
            case $file in
            */avx512bf16*) set_of="$avx2 $avx512 -mavx512bf16" ;;
            */avx512*) set_of="$avx2 $avx512" ;;
            */avx2*) set_of=$avx2 ;;
            *) set_of= ;;
            esac
            compile "$fast $set_of" "$file"
        done
        compile "-O3" tests/support/*.c tests/reference/*.c
        compile "" tests/metal/basics.c tests/metal/expect.c tests/metal/problems.c tests/metal/run.c \
            tests/metal/test_case.c tests/metal/wrong_lengths.c
        compile "-DMETALSIM_CUDA_INCLUDE='\"$PWD/metalsim/cuda/include\"' -DMFA_SOURCES='\"$PWD/src\"'" \
            metalsim/cuda/gpu.c
    } | tr '\n' '\0' | xargs -0 -n 1 -P "$cores" sh -c || return 1
    rm -f "$out/objects.a"
    ar rcs "$out/objects.a" "$out"/objects/*.o || return 1
    for program in tests/check_metal.c metalsim/cuda/check_large.c; do
        gcc -std=gnu11 -O2 -Iinclude -Isrc -Itests -I. "$program" "$out/objects.a" \
            -o "$out/$(basename "$program" .c)" "-L$cuda/lib64" -lcudart_static -lm -lpthread -ldl -lrt || return 1
    done
}

# --- Run -------------------------------------------------------------------------------------------

# count NAME FILE...: adds up the last lines "N passed, N failed"; a log without one is a failure
count() {
    name=$1
    shift
    good=0
    bad=0
    for log in "$@"; do
        line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$log" | tail -n 1)
        [ -n "$line" ] || line="0 passed, 1 failed"
        good=$((good + ${line%% *}))
        line=${line#*, }
        bad=$((bad + ${line%% *}))
    done
    passed=$((passed + good))
    failed=$((failed + bad))
    echo "$(since) s  $name: $good passed, $bad failed"
    [ "$bad" = 0 ] || grep -h -A 2 '^FAILED ' "$@" | head -n 20
}

# shards NAME OPTION...: check_metal in as many processes as there are cores
shards() {
    name=$1
    shift
    n=0
    while [ "$n" -lt "$cores" ]; do
        timeout 240 "$out/check_metal" "$@" --shard "$n/$cores" >"$out/logs/$name-$n" 2>&1 &
        n=$((n + 1))
    done
    wait
    count "$name" "$out/logs/$name"-*
}

# sanitize TOOL: on a problem for each row of the tiles in f16, whose programs are compiled by now
sanitize() {
    timeout 240 compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$out/check_metal" --tiles --filter " f16 " --shard 0/2 >"$out/logs/$1" 2>&1
    echo $? >"$out/logs/$1-code"
}

echo "machine: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)," \
    "$(nvcc --version | grep release), $cores cores, $(date +%F)"
rm -f "$out"/logs/*
if ! build >"$out/logs/build" 2>&1; then
    cat "$out/logs/build"
    echo "0 passed, 1 failed"
    exit 1
fi
echo "$(since) s  built"
timeout 240 "$out/check_metal" --basics >"$out/logs/basics" 2>&1
count basics "$out/logs/basics"
shards cases
shards tiles --tiles
shards random --random 320 --seed 11
timeout 240 "$out/check_large" >"$out/logs/large" 2>&1
grep -E '^(ok|FAILED)' "$out/logs/large"
count large "$out/logs/large"
for tool in memcheck racecheck synccheck initcheck; do
    sanitize "$tool" &
done
wait
for tool in memcheck racecheck synccheck initcheck; do
    count "$tool" "$out/logs/$tool"
    if [ "$(cat "$out/logs/$tool-code")" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
    grep -E 'SUMMARY|========= (Error|Race|Warning|Invalid|Uninit)' "$out/logs/$tool" | sort | uniq -c | head -n 10
done
echo "$(ls "$out"/programs/*.cubin | wc -l) programs compiled, $(since) s in all"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
