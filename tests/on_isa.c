/* Runs a program on one instruction set: sets MFA_ISA, or skips the test on a machine that does not have the set.
 *
 *     on_isa avx512 PROGRAM [ARGUMENT ...] */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "mfa.h"

enum { SKIPPED = 77 }; /* SKIP_RETURN_CODE of the tests */

int main(int count, char **words)
{
    if (count < 3) {
        fprintf(stderr, "usage: %s ISA PROGRAM [ARGUMENT ...]\n", words[0]);
        return 2;
    }
    const mfa_status status = mfa_isa_supported(words[1]);
    if (status != MFA_OK) {
        printf("SKIPPED: %s\n", mfa_last_error());
        return status == MFA_UNAVAILABLE ? SKIPPED : 1;
    }
    setenv("MFA_ISA", words[1], 1);
    execv(words[2], words + 2);
    perror(words[2]);
    return 1;
}
