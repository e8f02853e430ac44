/* The lengths of sequences and the places of their keys: drawn, and rows that belong to none made NaN. */
#ifndef SUPPORT_LENGTHS_H
#define SUPPORT_LENGTHS_H

#include "support/generator.h"
#include "support/operands.h"

/* Draws one of the tensors of 32-bit integers; those before it in enum reference_tensor have been drawn. Elements of
 * block tables that no key needs are wrong page numbers. */
void lengths_fill(struct inputs *inputs, enum reference_tensor tensor, struct generator *generator);

/* NaN in rows of Q, dO, K and V, or of the scales of these, that no sequence has, unless they are broadcast. */
void lengths_poison(struct inputs *inputs);

#endif
