/* The numbers of dropout: Philox against its authors' known answers, mfa_problem_dropout_mask against the reference,
 * and the statistics of a mask: its rate, and that queries, keys, heads and batch entries do not depend on each
 * other. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mfa.h"
#include "reference/attention.h"

/* Of kat_vectors in Random123: counter, key, numbers. */
static void test_known_answers(void **state)
{
    static const uint32_t answers[][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
         0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1},
    };
    (void)state;
    for (size_t n = 0; n < sizeof answers / sizeof *answers; n++) {
        uint32_t words[4];
        reference_philox(answers[n], answers[n] + 4, words);
        assert_memory_equal(words, answers[n] + 6, sizeof words);
    }
}

static mfa_problem problem_of(int64_t batch, int64_t heads, int64_t q_len, int64_t kv_len, double dropout)
{
    mfa_problem p;
    mfa_problem_init(&p, batch, heads, heads, q_len, kv_len, 64, 64);
    p.dropout = dropout;
    return p;
}

static uint8_t *mask_of(const mfa_problem *p, const uint64_t *seed)
{
    uint8_t *kept = malloc((size_t)(p->batch * p->q_heads * p->q_len * p->kv_len));
    assert_non_null(kept);
    assert_int_equal(mfa_problem_dropout_mask(p, seed, kept), MFA_OK);
    return kept;
}

static void test_mask_is_the_reference(void **state)
{
    static const double rates[] = {0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1};
    static const uint64_t seeds[] = {0, UINT64_C(0x1234567890abcdef), UINT64_MAX};
    (void)state;
    for (size_t n = 0; n < sizeof rates / sizeof *rates; n++)
        for (int broadcast = 0; broadcast < 2; broadcast++) {
            mfa_problem p = problem_of(3, 2, 5, 19, rates[n]);
            if (broadcast)
                p.seed_layout.batch = 0;
            uint8_t *kept = mask_of(&p, seeds), *at = kept;
            double Z[19];
            for (int64_t b = 0; b < 3; b++)
                for (int64_t h = 0; h < 2; h++)
                    for (int64_t i = 0; i < 5; i++, at += 19) {
                        reference_dropout(&p, seeds[broadcast ? 0 : b], b, h, i, 0, 19, Z);
                        for (int64_t j = 0; j < 19; j++)
                            assert_int_equal(at[j], rates[n] == 0 || Z[j] != 0);
                    }
            free(kept);
        }
    print_message("%zu rates, one seed and one for each batch entry\n", sizeof rates / sizeof *rates);
}

static void test_no_dropout_keeps_all(void **state)
{
    const uint64_t seed = 5;
    (void)state;
    for (int drops = 0; drops < 2; drops++) {
        const mfa_problem p = problem_of(1, 1, 100, 100, drops);
        uint8_t *kept = mask_of(&p, &seed);
        for (int n = 0; n < 100 * 100; n++)
            assert_int_equal(kept[n], !drops);
        free(kept);
    }
}

/* How many of `count` pairs, `step` apart, are both kept: in units of the deviation from what independence gives. */
static double pairs(const uint8_t *kept, int64_t count, int64_t step, double keep)
{
    int64_t both = 0;
    for (int64_t n = 0; n < count; n++)
        both += kept[n] & kept[n + step];
    const double expected = keep * keep;
    return ((double)both / (double)count - expected) / sqrt(expected * (1 - expected) / (double)count);
}

static void test_statistics(void **state)
{
    enum { BATCH = 2, HEADS = 4, ROWS = 256, KEYS = 512 };
    static const double rates[] = {0.1, 0.5, 0.9};
    static const struct {
        const char *name;
        int64_t step;
    } steps[] = {{"neighbours", 1},
                 {"keys of a word", 2},
                 {"keys of the next counter", 8},
                 {"queries", KEYS},
                 {"queries 2 apart", 2 * KEYS},
                 {"heads", ROWS * KEYS},
                 {"batch entries", HEADS * ROWS * KEYS}};
    (void)state;
    for (size_t n = 0; n < sizeof rates / sizeof *rates; n++)
        for (uint64_t seed = 1; seed < 4; seed++) {
            const double keep = 1 - floor(rates[n] * 65536 + 0.5) / 65536;
            mfa_problem p = problem_of(BATCH, HEADS, ROWS, KEYS, rates[n]);
            p.seed_layout.batch = 0;
            uint8_t *kept = mask_of(&p, &seed);
            const int64_t count = BATCH * HEADS * ROWS * KEYS;
            int64_t sum = 0;
            for (int64_t at = 0; at < count; at++)
                sum += kept[at];
            const double off = ((double)sum / (double)count - keep) / sqrt(keep * (1 - keep) / (double)count);
            assert_true(fabs(off) < 4.5);
            double worst = 0;
            for (size_t s = 0; s < sizeof steps / sizeof *steps; s++) {
                const double z = pairs(kept, count - steps[s].step, steps[s].step, keep);
                /* the rate's own deviation counts twice in pairs */
                if (fabs(z) > 4.5 + 2 * fabs(off))
                    fail_msg("%s: kept together %g deviations more often than independent ones", steps[s].name, z);
                worst = fmax(worst, fabs(z));
            }
            const uint64_t other = seed + 100;
            uint8_t *others = mask_of(&p, &other);
            int64_t both = 0;
            for (int64_t at = 0; at < count; at++)
                both += kept[at] & others[at];
            const double expected = keep * keep, z = ((double)both / (double)count - expected) /
                                                     sqrt(expected * (1 - expected) / (double)count);
            assert_true(fabs(z) < 4.5 + 2 * fabs(off));
            print_message("rate %g, seed %llu: off by %.2f deviations, pairs by at most %.2f\n", rates[n],
                          (unsigned long long)seed, off, worst);
            free(kept);
            free(others);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_answers),
        cmocka_unit_test(test_mask_is_the_reference),
        cmocka_unit_test(test_no_dropout_keeps_all),
        cmocka_unit_test(test_statistics),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
