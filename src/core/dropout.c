#include "core/dropout.h"

#include "core/philox.h"
#include "core/problem.h"

int64_t mfa_dropout_below(double dropout)
{
    const int64_t below = (int64_t)(dropout * 0x1p16 + 0.5);
    return dropout < 1 && below > 0xffff ? 0xffff : below;
}

double mfa_dropout_kept(double dropout)
{
    return dropout < 1 ? 1 - dropout : 1;
}

/* Of query i of a head. */
static void write_row(const mfa_problem *p, uint64_t seed, int64_t b, int64_t h, int64_t i, uint8_t *kept)
{
    const int64_t below = mfa_dropout_below(p->dropout);
    struct mfa_philox x = {{0, 0, 0, 0}};
    for (int64_t j = 0; j < p->kv_len; j++) {
        const int64_t n = j % MFA_PHILOX_KEYS;
        if (n == 0)
            x = mfa_philox(
                (struct mfa_philox){{(uint32_t)(j / MFA_PHILOX_KEYS), (uint32_t)i, (uint32_t)h, (uint32_t)b}},
                (uint32_t)seed, (uint32_t)(seed >> 32));
        kept[j] = (x.x[n / 2] >> n % 2 * 16 & 0xffff) >= below;
    }
}

mfa_status mfa_dropout_write_mask(const mfa_problem *problem, const uint64_t *seed, uint8_t *kept)
{
    mfa_problem p;
    const mfa_status status = mfa_problem_check(problem, &p);
    if (status != MFA_OK)
        return status;
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t h = 0; h < p.q_heads; h++)
            for (int64_t i = 0; i < p.q_len; i++, kept += p.kv_len)
                write_row(&p, p.dropout > 0 ? seed[b * p.seed_layout.batch] : 0, b, h, i, kept); /* else no layout */
    return MFA_OK;
}
