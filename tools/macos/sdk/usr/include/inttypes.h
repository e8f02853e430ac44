/* What libmfa uses of <inttypes.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _INTTYPES_H
#define _INTTYPES_H

#include <stdint.h>

#define PRId64 "lld"
#define PRIx64 "llx"

#endif
