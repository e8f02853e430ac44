# Writes files as C string literals, for a C file to include: a line {"name", "text"}, for each.
#     cmake -DOUTPUT=FILE -DFOLDER=FOLDER -DNAMES="a;b/c" -P tools/embed.cmake
# Names are those of files in FOLDER. A script and no program, so that a cross compiler needs no other beside it.
set(result "")
foreach(name IN LISTS NAMES)
    file(READ "${FOLDER}/${name}" text)
    string(REPLACE "\\" "\\\\" text "${text}")
    string(REPLACE "\"" "\\\"" text "${text}")
    string(REPLACE "\n" "\\n\"\n\"" text "${text}")
    string(APPEND result "{\"${name}\",\n\"${text}\"},\n")
endforeach()
file(WRITE "${OUTPUT}" "${result}")
