/* AMX: tile registers, which a process has to ask its system for. */
#ifndef MFA_CPU_AMX_H
#define MFA_CPU_AMX_H

/* 1 if the CPU has AMX_TILE and AMX_BF16 and this process may use them; asks for that. Only where x86 is. */
int mfa_cpu_amx_present(void);

#endif
