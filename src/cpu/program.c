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

const struct mfa_cpu_kernels *mfa_cpu_program_find(mfa_cpu_isa isa, int32_t dtype)
{
    int32_t real = dtype == MFA_F64 ? MFA_F64 : MFA_F32;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (entries[i].isa == isa && entries[i].dtype == real)
            return entries[i].kernels->lanes ? entries[i].kernels : NULL;
    return NULL;
}

int mfa_cpu_program_has(mfa_cpu_isa isa)
{
    return mfa_cpu_program_find(isa, MFA_F32) && mfa_cpu_program_find(isa, MFA_F64);
}
