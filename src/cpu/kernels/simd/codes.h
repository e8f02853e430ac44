/* The loads of codes without intrinsics, for vector APIs that have vec_load and vec_load_f16. */

/* LANES codes of K or V as numbers (enum mfa_kv_type in include/mfa.h): signed bytes; 8-bit floats, of which e4m3 are
 * still to be multiplied by 2^8; the low (half 0) or the high 4 bits of bytes as indices of a table. */
static inline vec vec_load_int8(const uint8_t *p)
{
    real lanes[LANES];
    for (int i = 0; i < LANES; i++)
        lanes[i] = (real)(int8_t)p[i];
    return vec_load(lanes);
}

/* An 8-bit float is the high byte of an f16, or with a bit more of the fraction a part of one. */
static inline vec vec_load_e5m2(const uint8_t *p)
{
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; i++)
        halves[i] = (uint16_t)(p[i] << 8);
    return vec_load_f16(halves);
}

static inline vec vec_load_e4m3(const uint8_t *p)
{
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; i++) {
        const int size = p[i] & 0x7f;
        halves[i] = (uint16_t)((p[i] & 0x80) << 8 | (size == 0x7f ? 0x7e00 : size << 7));
    }
    return vec_load_f16(halves);
}

/* The numbers of the 16 codes of 4 bits, times a scale. */
struct code_table {
    real numbers[16];
};

static inline struct code_table vec_code_table(const float *numbers, real scale)
{
    struct code_table table;
    for (int i = 0; i < 16; i++)
        table.numbers[i] = (real)numbers[i] * scale;
    return table;
}

static inline vec vec_load_nibbles(const uint8_t *p, int half, struct code_table table)
{
    real lanes[LANES];
    for (int i = 0; i < LANES; i++)
        lanes[i] = table.numbers[half ? p[i] >> 4 : p[i] & 15];
    return vec_load(lanes);
}

/* LANES / n floats, each n times: n divides LANES. */
static inline vec vec_spread(const float *p, int n)
{
    real lanes[LANES];
    for (int i = 0; i < LANES; i++)
        lanes[i] = (real)p[i / n];
    return vec_load(lanes);
}
