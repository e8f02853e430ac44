/* The public functions of libmfa, as the macOS library has them: each jumps to the function of that name in the file
 * MFA_DYLIB, which the loader of metalsim/macho opens before main. So a test program that is linked with this file
 * instead of libmfa tests the library that ships. */
#include <stdio.h>
#include <stdlib.h>

#include "metalsim/macho/macho.h"

/* MFA_SYMBOLS has SYMBOL(mfa_version) and so on, a line for each name in tests/symbols.txt. */
#define SYMBOL(name)                                     \
    void *slot_##name;                                   \
    __asm__(".text\n"                                    \
            ".globl " #name "\n"                         \
            ".type " #name ", %function\n" #name ":\n"   \
            "    adrp x16, slot_" #name "\n"             \
            "    ldr x16, [x16, :lo12:slot_" #name "]\n" \
            "    br x16\n");
#include MFA_SYMBOLS
#undef SYMBOL

__attribute__((constructor)) static void open_library(void)
{
    char error[512];
    const char *path = getenv("MFA_DYLIB");
    const macho_image *image = path ? macho_open(path, macho_system, error, sizeof error) : NULL;
    if (!image) {
        printf("MFA_DYLIB must name libmfa.dylib: %s\n", path ? error : "it is not set");
        exit(2);
    }
#define SYMBOL(name)                                    \
    slot_##name = macho_find(image, "_" #name);         \
    if (!slot_##name) {                                 \
        printf("%s does not export %s\n", path, #name); \
        exit(2);                                        \
    }
#include MFA_SYMBOLS
#undef SYMBOL
}
