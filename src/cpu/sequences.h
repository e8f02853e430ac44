/* The sequences of a problem whose batch entries have lengths or places of their own (contract.h): read from the
 * tensors that say so, checked, and put in order, when a run begins. */
#ifndef MFA_CPU_SEQUENCES_H
#define MFA_CPU_SEQUENCES_H

#include "cpu/kernels/contract.h"
#include "mfa.h"

/* Bytes of memory for them; 0 if all entries are alike. */
uint64_t mfa_cpu_sequences_bytes(const struct mfa_cpu_call *call, int32_t pass);

/* The most that mfa_cpu_units can be, whatever the tensors say; of a set with panels of so many queries. */
int64_t mfa_cpu_sequences_most(const struct mfa_cpu_call *call, int panel, enum mfa_cpu_unit unit);

/* Fills in what the call says of sequences, `entry` too; `splits` are those of entries that are alike. Operands must
 * be bound. Without memory it fills in `entry` alone. MFA_INVALID: a tensor has a wrong number. */
mfa_status mfa_cpu_sequences_make(struct mfa_cpu_call *call, int panel, int workers, int64_t splits, void *memory);

#endif
