/* Identifies this process. Its PID does not: in a PID namespace a child may have the number that its parent has in
 * another. */
#ifndef MFA_BASE_PROCESS_H
#define MFA_BASE_PROCESS_H

#include <stdint.h>

/* Never 0, and in a child after fork() greater than any number that its parent had until then. Makes no system call,
 * except the first time in a process. */
uint32_t mfa_process_number(void);

#endif
