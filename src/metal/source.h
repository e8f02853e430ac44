/* The text of a kernel's program, made from kernels/ and a key. */
#ifndef MFA_METAL_SOURCE_H
#define MFA_METAL_SOURCE_H

#include "core/key.h"
#include "core/operand.h"
#include "metal/kernels/contract.h"
#include "metal/tiles.h"
#include "mfa.h"

#define MFA_METAL_BUFFERS (MFA_METAL_BUFFER_OPERAND + MFA_OPERAND_k_scale) /* for scales take others' places */

/* The name of a kernel's function; NULL: there is no such kernel. */
const char *mfa_metal_source_function(enum mfa_metal_kernel kernel);

/* The buffer to which operand n is bound (kernels/contract.h), and the operand of a buffer in a pass. */
int mfa_metal_source_buffer_of(int operand);
int mfa_metal_source_operand_of(int buffer, int32_t pass);

/* Bit n: the kernel with this key takes buffer n. */
uint32_t mfa_metal_source_buffers(enum mfa_metal_kernel kernel, const struct mfa_key *key);

/* Writes Metal Shading Language with our includes expanded, to be freed by the caller. `defines` (may be NULL)
 * are lines that go before all others. MFA_UNSUPPORTED: the key has no such kernel. MFA_UNAVAILABLE: this library was
 * built without its kernels' text. */
mfa_status mfa_metal_source_write(const struct mfa_key *key, enum mfa_metal_kernel kernel, const char *defines,
                                  char **text);

/* The same with layout_test behind it. */
mfa_status mfa_metal_source_write_with_test(const struct mfa_key *key, enum mfa_metal_kernel kernel, char **text);

#endif
