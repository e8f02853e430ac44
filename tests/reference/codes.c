/* What the codes of quantised K and V stand for, from the definitions of their formats; no code is shared with the
 * library. */
#include <math.h>
#include <stdlib.h>

#include "reference/attention.h"

/* (-1)^sign * 2^(exponent - bias) * 1.fraction; of exponent 0, 2^(1 - bias) * 0.fraction. */
static double decode_float(uint8_t code, int fraction_bits, int bias)
{
    const int exponent = (code & 0x7f) >> fraction_bits, fraction = code & ((1 << fraction_bits) - 1);
    const double size =
        ldexp(exponent ? (1 << fraction_bits) + fraction : fraction, (exponent ? exponent : 1) - bias - fraction_bits);
    return code & 0x80 ? -size : size;
}

double reference_code(int32_t type, uint8_t code)
{
    static const double nf4[] = {-1.0,
                                 -0.6961928009986877,
                                 -0.5250730514526367,
                                 -0.39491748809814453,
                                 -0.28444138169288635,
                                 -0.18477343022823334,
                                 -0.09105003625154495,
                                 0.0,
                                 0.07958029955625534,
                                 0.16093020141124725,
                                 0.24611230194568634,
                                 0.33791524171829224,
                                 0.44070982933044434,
                                 0.5626170039176941,
                                 0.7229568362236023,
                                 1.0};
    switch (type) {
    case MFA_KV_INT8: return code < 128 ? code : code - 256;
    case MFA_KV_E4M3: return (code & 0x7f) == 0x7f ? NAN : decode_float(code, 3, 7);
    case MFA_KV_E5M2:
        return (code & 0x7f) > 0x7c    ? NAN
               : (code & 0x7f) == 0x7c ? (code & 0x80 ? -INFINITY : INFINITY)
                                       : decode_float(code, 2, 15);
    case MFA_KV_INT4: return (code & 15) - 8;
    default: return nf4[code & 15];
    }
}
