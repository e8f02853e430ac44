# Builds libmfa.dylib for macOS 14 on arm64, on any machine with clang and lld: no SDK and nothing else of Apple's.
#     cmake -DCMAKE_TOOLCHAIN_FILE=tools/macos/toolchain.cmake ...
# sdk/ has prototypes of the few functions of libSystem that libmfa uses, and the list of them for the linker.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_ARCHITECTURES arm64)
set(CMAKE_OSX_DEPLOYMENT_TARGET 14.0)
set(CMAKE_OSX_SYSROOT ${CMAKE_CURRENT_LIST_DIR}/sdk)

set(CMAKE_C_COMPILER clang-19)
set(CMAKE_C_COMPILER_TARGET arm64-apple-macos14.0)
set(CMAKE_AR llvm-ar-19)
set(CMAKE_RANLIB llvm-ranlib-19)
set(CMAKE_NM llvm-nm-19)
set(CMAKE_INSTALL_NAME_TOOL llvm-install-name-tool-19)

# The linker signs what it links (ad hoc), and macOS runs nothing unsigned on arm64. So nothing may touch the file
# afterwards: its install name is final, it has no paths to be replaced, and it is not stripped.
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-fuse-ld=lld-19 -mlinker-version=907 -Wl,-x")
set(CMAKE_SKIP_RPATH ON)
set(CMAKE_STRIP "" CACHE FILEPATH "None: see above.")

# There is no program to be linked, so CMake's compiler checks stop at compiling.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_HAVE_LIBC_PTHREAD ON)
