/* AMX: tile registers, which a process has to request from the operating system. */
#ifndef MFA_CPU_AMX_H
#define MFA_CPU_AMX_H

/* 1 if the CPU has AMX_TILE and AMX_BF16 and this process may use them, which the call requests; else 0. Only for
 * x86. */
int mfa_cpu_amx_present(void);

#endif
