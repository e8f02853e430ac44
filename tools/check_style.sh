#!/bin/sh
# Checks the style of files and commits: tools/check_style.sh [ROOT]
# Tabs, trailing blanks, line ends, long lines, foreign characters, long files, left-overs, commit subjects.
# One test per rule; prints a line per problem, and at last N passed, N failed.
set -u
cd "${1:-$(dirname "$0")/..}" || exit 1
LC_ALL=C
export LC_ALL
passed=0
failed=0

# files PATTERN...: the project's files of these names
files() {
    for pattern in "$@"; do
        find . -name .git -prune -o -path ./build -prune -o -path ./dist -prune -o -name __pycache__ -prune -o \
            -path './.[!c]*' -prune -o -type f -name "$pattern" -print
    done | sort
}

code() {
    files '*.c' '*.h' '*.inc' '*.py' '*.sh' run '*.toml' CMakeLists.txt
}

# rule SENTENCE: standard input lists the problems, a line each
rule() {
    problems=$(cat)
    if [ -z "$problems" ]; then
        passed=$((passed + 1))
        return
    fi
    failed=$((failed + 1))
    echo "$1:"
    echo "$problems"
}

# lines AWK_CONDITION: the places where it holds, in the files that standard input lists
lines() {
    while IFS= read -r file; do
        awk -v file="${file#./}" "$1"' { print file ":" FNR }' "$file"
    done
}

rule "a tab" <<END
$(code | lines '/\t/')
END
rule "blanks at the end of a line, or a carriage return" <<END
$({ code; files '*.md' '*.txt' Makefile; } | lines '/[ \t\r]$/')
END
rule "no newline at the end of a file, or an empty line there" <<END
$({ code; files '*.md' '*.txt' Makefile; } | while IFS= read -r file; do
    [ "$(tail -c 1 "$file" | tr '\n' N)$(tail -n 1 "$file" | tr -d '\n' | wc -c)" = N0 ] && echo "${file#./}"
    [ -s "$file" ] && [ "$(tail -c 1 "$file" | tr '\n' N)" != N ] && echo "${file#./}"
done)
END
rule "a line over 120 columns" <<END
$(code | lines 'length > 120')
END
rule "a character that is not ASCII" <<END
$(code | lines '/[^\t -~]/')
END
rule "a file over 600 lines" <<END
$(code | while IFS= read -r file; do
    [ "$(wc -l <"$file")" -le 600 ] || echo "${file#./}"
done)
END
rule "a left-over" <<END
$(code | grep -v check_style.sh | lines '/(^|[^A-Za-z_])(TODO|FIXME|XXX|HACK)([^A-Za-z_]|$)|^ *# *if +0 *$/')
END
if [ -d .git ]; then
    rule 'a commit whose subject is not "area: what"' <<END
$(git log --no-merges -20 --format=%s 2>/dev/null | grep -v -E '^[a-z0-9_./, -]+: [^ ]' | head)
END
fi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
