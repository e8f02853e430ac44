/* Reading a caller's struct that may be older than this library. */
#include "base/sized.h"

#include <string.h>

#include "base/error.h"

mfa_status mfa_sized_copy(const char *name, const void *given, size_t first, void *copy, size_t current)
{
    uint64_t size;
    memcpy(&size, given, sizeof size);
    if (size < first || size > current) {
        if (first == current)
            return mfa_fail(MFA_INVALID, "size of %s is %llu; it must be sizeof(%s), %zu", name,
                            (unsigned long long)size, name, current);
        return mfa_fail(MFA_INVALID, "size of %s is %llu; this library knows %zu to %zu", name,
                        (unsigned long long)size, first, current);
    }
    memcpy(copy, given, (size_t)size);
    memset((char *)copy + size, 0, current - (size_t)size);
    size = current;
    memcpy(copy, &size, sizeof size);
    return MFA_OK;
}
