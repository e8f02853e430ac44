/* The tensors of a run: which members of the problem give their sizes, which pass reads or writes them. One table, made
 * from operands.inc, used when a problem is checked and again when buffers are. */
#ifndef MFA_CORE_OPERAND_H
#define MFA_CORE_OPERAND_H

#include <stddef.h>
#include <stdint.h>

#include "mfa.h"

/* 0: not used by this problem. */
enum mfa_role {
    MFA_ROLE_READ = 1,
    MFA_ROLE_WRITTEN = 2,
    MFA_ROLE_REQUIRED = 4, /* must be given, unless it has no elements */
    MFA_ROLE_SUMMED = 8    /* written; stride 0: summed along that dimension */
};

/* The types of an element, as operands.inc names them. */
enum mfa_element {
    MFA_ELEMENT_DATA, /* the problem's dtype */
    MFA_ELEMENT_OUT,  /* the same, or f32: its out_type */
    MFA_ELEMENT_K_CODE,
    MFA_ELEMENT_V_CODE,
    MFA_ELEMENT_ROW_SUM, /* f32, or f64 where the problem is */
    MFA_ELEMENT_MASK,
    MFA_ELEMENT_FLOAT,
    MFA_ELEMENT_INTEGER64,
    MFA_ELEMENT_INTEGER32,
    MFA_ELEMENT_BYTE
};

struct mfa_operand {
    const char *name;
    size_t layout, buffer;                /* offsets in mfa_problem and in mfa_buffers */
    size_t entries, heads, rows, columns; /* its sizes: see operand.c; 0: the size is 1 */
    const char *where;                    /* "problems with a mask": which have it; "": all */
    uint8_t element;                      /* enum mfa_element */
    uint8_t role[2];                      /* in the forward and in the backward pass, of problems that have it */
};

enum mfa_operand_number {
#define INPUT(name, ...) MFA_OPERAND_##name,
#define RESULT(name, ...) MFA_OPERAND_##name,
#define RESULT_LIKE(name, ...) MFA_OPERAND_##name,
#include "core/operands.inc"
    MFA_OPERAND_COUNT
};

extern const struct mfa_operand mfa_operands[MFA_OPERAND_COUNT];

/* A set of enum mfa_role. The problem's enums must be valid. */
int mfa_operand_role(const struct mfa_operand *operand, const mfa_problem *problem);

/* Sizes in the order of mfa_layout: batch, heads, rows, columns. */
void mfa_operand_shape(const struct mfa_operand *operand, const mfa_problem *problem, int64_t shape[4]);

/* The sizes of what lies in memory: 1 along dimensions that are summed over, however long these are. Returns 0 if there
 * is no element. */
int mfa_operand_extent(const struct mfa_operand *operand, const mfa_problem *problem, int64_t shape[4]);

/* The caller's buffer for operand number `n`. */
const mfa_buffer *mfa_operand_buffer(const mfa_buffers *buffers, int n);

/* The dtype of MFA_ELEMENT_OUT: of o, dq, dk and dv. */
int32_t mfa_operand_out_dtype(const mfa_problem *problem);

/* Bytes of one element. */
size_t mfa_operand_element(const struct mfa_operand *operand, const mfa_problem *problem);

#endif
