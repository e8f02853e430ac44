#include "cpu/program.h"

static const struct entry {
    mfa_cpu_isa isa;
    int32_t dtype;
    const struct mfa_cpu_kernels *kernels;
} entries[] = {
#define KERNELS(isa, dtype, name) {isa, dtype, &mfa_cpu_kernels_##name},
#include "cpu/kernels/kernels.inc"
#undef KERNELS
};

enum { ENTRIES = sizeof entries / sizeof *entries };

/* That of the dtype itself if there is one, else that of its reals; NULL: neither. */
static const struct entry *entry_of(mfa_cpu_isa isa, int32_t dtype)
{
    const int32_t real = dtype == MFA_F64 ? MFA_F64 : MFA_F32;
    const struct entry *found = NULL;
    for (int i = 0; i < ENTRIES; i++)
        if (entries[i].isa == isa && (entries[i].dtype == dtype || (!found && entries[i].dtype == real)))
            found = &entries[i];
    return found;
}

mfa_cpu_isa mfa_cpu_program_isa(mfa_cpu_isa isa, int32_t dtype)
{
    while (!entry_of(isa, dtype))
        isa = (mfa_cpu_isa)(isa - 1); /* what an instruction set has nothing new for, those below it have */
    return isa;
}

const struct mfa_cpu_kernels *mfa_cpu_program_find(mfa_cpu_isa isa, int32_t dtype)
{
    return entry_of(mfa_cpu_program_isa(isa, dtype), dtype)->kernels;
}

int mfa_cpu_program_has(mfa_cpu_isa isa)
{
    for (int i = 0; i < ENTRIES; i++)
        if (entries[i].isa == isa && !entries[i].kernels->lanes)
            return 0;
    return 1;
}
