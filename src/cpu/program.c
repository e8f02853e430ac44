#include "cpu/program.h"

#include <math.h>

#include "core/key.h"

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

/* The kernel set of the dtype; else that of its reals, f32 or f64; NULL: there is neither. */
static const struct entry *entry_of(mfa_cpu_isa isa, int32_t dtype)
{
    const int32_t real = dtype == MFA_F64 ? MFA_F64 : MFA_F32;
    const struct entry *found = NULL;
    for (int i = 0; i < ENTRIES; i++)
        if (entries[i].isa == isa && (entries[i].dtype == dtype || (!found && entries[i].dtype == real)))
            found = &entries[i];
    return found;
}

/* Dot products of bf16 pairs take Q unscaled and apply the scale to the result: with a scale far from 1 they might
 * overflow or underflow although the scores do not. Other kernels apply a part of the scale to Q. */
static int needs_scaled_queries(const mfa_problem *p)
{
    const double size = fabs(p->scale);
    return size != 0 && !(size >= 0x1p-40 && size <= 0x1p40);
}

/* Codes are widened to reals, which bf16 pairs would round. */
static int needs_reals(const mfa_problem *p)
{
    return p->k_type || p->v_type || needs_scaled_queries(p);
}

mfa_cpu_isa mfa_cpu_program_isa(mfa_cpu_isa isa, const mfa_problem *problem)
{
    const struct entry *entry = entry_of(isa, problem->dtype);
    while (!entry || (entry->dtype == MFA_BF16 && needs_reals(problem))) {
        isa = (mfa_cpu_isa)(isa - 1); /* a lower instruction set has a kernel set for it */
        entry = entry_of(isa, problem->dtype);
    }
    return isa;
}

/* The set of an instruction set that has products of int8; NULL: none. */
static const struct mfa_cpu_kernels *int8_kernels(mfa_cpu_isa isa)
{
    for (int i = 0; i < ENTRIES; i++)
        if (entries[i].isa == isa && entries[i].kernels->int8)
            return entries[i].kernels;
    return NULL;
}

/* The scale is a factor of what each query is multiplied by, which stays finite for any query if it is at most 1. */
mfa_cpu_isa mfa_cpu_program_int8(mfa_cpu_isa isa, const mfa_problem *problem)
{
    if (!problem->fast || problem->dtype == MFA_F64 || needs_scaled_queries(problem) || fabs(problem->scale) > 1)
        return MFA_CPU_ISA_COUNT;
    for (int at = (int)isa; at >= 0; at--)
        if (int8_kernels((mfa_cpu_isa)at))
            return (mfa_cpu_isa)at;
    return MFA_CPU_ISA_COUNT;
}

const struct mfa_cpu_kernels *mfa_cpu_program_find(mfa_cpu_isa isa, int32_t dtype, int32_t variant)
{
    return variant == MFA_VARIANT_INT8 ? int8_kernels(isa) : entry_of(isa, dtype)->kernels;
}

int mfa_cpu_program_has(mfa_cpu_isa isa)
{
    for (int i = 0; i < ENTRIES; i++)
        if (entries[i].isa == isa && !entries[i].kernels->lanes)
            return 0;
    return 1;
}
