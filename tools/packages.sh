#!/bin/sh
# Installs the system packages that a goal needs: tools/packages.sh build|bench|wheels|test
# As root on Debian and its kin it installs what is missing; otherwise it names what is missing and fails.
set -eu
goal=$1
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo 'int main(void) { return 0; }' >"$scratch/empty.c"
printf '#include <setjmp.h>\n#include <stdarg.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <cmocka.h>\n' |
    cat - "$scratch/empty.c" >"$scratch/cmocka.c"

# need "PACKAGE..." COMMAND...: the packages are missing if the command fails
need() {
    packages=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $packages"
}

# links COMPILER OPTION...: can it make a program?
# shellcheck disable=SC2317
links() {
    "$@" -o "$scratch/program"
}

look() {
    missing=
    need "gcc libc6-dev" links cc "$scratch/empty.c" -lm -lpthread
    need "python3 python3-venv" "$python" -c 'import ensurepip, venv'
    [ "$goal" != build ] || return 0
    [ "$goal" = wheels ] || need g++ links g++ -x c++ "$scratch/empty.c"
    [ "$goal" != bench ] || return 0
    need "gcc-aarch64-linux-gnu libc6-dev-arm64-cross" links aarch64-linux-gnu-gcc -static "$scratch/empty.c" -lm
    need clang-19 clang-19 --version
    need lld-19 ld64.lld-19 --version
    need llvm-19 llvm-cov-19 --version
    [ "$goal" = test ] || return 0
    need git git --version
    need ccache ccache --version
    need libcmocka-dev links cc "$scratch/cmocka.c" -lcmocka
    need "clang-19 libclang-rt-19-dev" links clang-19 -fsanitize=thread "$scratch/empty.c"
    need qemu-user-static command -v qemu-aarch64-static
}

look
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing the packages that make $goal needs:$missing"
    apt-get update -qq
    # The list is words on purpose.
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
    look
    [ -n "$missing" ] || exit 0
    echo "make $goal: still not usable after installation:$missing" >&2
    exit 1
fi
echo "make $goal: packages are missing. As root on Debian: apt-get install$missing" >&2
exit 1
