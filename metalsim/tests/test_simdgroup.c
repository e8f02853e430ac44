/* Simdgroups against plain loops: where matrices lie, how they are loaded, stored and multiplied, and
 * every function that lanes call together. In every build, and by every schedule. */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define ALL_FLOAT "LEFT float\nRESULT LEFT\nRIGHT LEFT\nADDED LEFT\nSIZE 64"

static const unsigned builds[] = {0, METALSIM_CHECKED};
#define BUILDS (sizeof builds / sizeof *builds)

static void run(const metalsim_library *library, const char *name, struct metalsim_dispatch dispatch)
{
    const metalsim_kernel *kernel = metalsim_library_find(library, name);
    assert_non_null(kernel);
    dispatch.threadgroups[0] = dispatch.threadgroups[1] = dispatch.threadgroups[2] = 1;
    dispatch.threads[0] = 32, dispatch.threads[1] = dispatch.threads[2] = 1;
    for (int schedule = METALSIM_NATURAL; schedule <= METALSIM_SHUFFLED; schedule++) {
        dispatch.schedule = (enum metalsim_schedule)schedule;
        dispatch.seed = 3;
        if (metalsim_dispatch_run(kernel, &dispatch) != METALSIM_OK)
            fail_msg("%s", metalsim_last_error());
    }
}

/* Elements as they lie in memory: small whole numbers are the same in all three types. */
enum type { FLOAT, HALF, BFLOAT };
static const char *const type_names[] = {"float", "half", "bfloat"};

static size_t size_of(enum type type)
{
    return type == FLOAT ? 4 : 2;
}

static void put(void *memory, enum type type, size_t i, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (type == FLOAT)
        memcpy((char *)memory + 4 * i, &bits, 4);
    if (type == BFLOAT)
        ((uint16_t *)memory)[i] = (uint16_t)(bits >> 16);
    if (type == HALF) { /* of a whole number below 2048, or 0 */
        uint32_t half = x == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits >> 23 & 0xff) - 112) << 10 | (bits >> 13 & 0x3ff);
        ((uint16_t *)memory)[i] = (uint16_t)half;
    }
}

static float get(const void *memory, enum type type, size_t i)
{
    uint32_t bits;
    float x;
    if (type == FLOAT)
        return ((const float *)memory)[i];
    uint16_t stored = ((const uint16_t *)memory)[i];
    if (type == BFLOAT)
        bits = (uint32_t)stored << 16;
    else
        bits = (stored & 0x8000u) << 16 |
               ((stored & 0x7fff) ? ((stored >> 10 & 31u) + 112) << 23 | (stored & 0x3ffu) << 13 : 0);
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* -- Loads and stores -- */

#define SIZE 512

struct copy_args {
    uint64_t from_row, from_x, from_y, to_row, to_x, to_y;
    uint32_t from_transposed, to_transposed;
};

/* By the documented signature: element (row, column) is at (origin.y + row) * elements_per_row + origin.x +
 * column; if transposed, element (row, column) is what (column, row) would be. */
static size_t matrix_index(uint64_t elements_per_row, uint64_t x, uint64_t y, uint32_t transposed, size_t row,
                           size_t column)
{
    size_t down = transposed ? column : row, right = transposed ? row : column;
    return (size_t)((y + down) * elements_per_row + x + right);
}

static void check_copy(const metalsim_library *library, enum type type, struct copy_args args, int local)
{
    _Alignas(16) unsigned char from[SIZE * 4], to[SIZE * 4];
    float expected[SIZE];
    for (size_t i = 0; i < SIZE; i++) {
        put(from, type, i, (float)(i % 251));
        put(to, type, i, expected[i] = -1.0f);
    }
    for (size_t row = 0; row < 8; row++)
        for (size_t column = 0; column < 8; column++)
            expected[matrix_index(args.to_row, args.to_x, args.to_y, args.to_transposed, row, column)] =
                (float)(matrix_index(args.from_row, args.from_x, args.from_y, args.from_transposed, row, column) % 251);
    size_t bytes = SIZE * size_of(type);
    run(library, "copy",
        (struct metalsim_dispatch){
            .buffers = {support_buffer(from, bytes), support_buffer(to, bytes), support_bytes(&args, sizeof args)},
            .threadgroup_lengths = {local ? bytes : 16},
        });
    for (size_t i = 0; i < SIZE; i++)
        assert_true(get(to, type, i) == expected[i]);
}

static void test_copy(void **state)
{
    const struct copy_args cases[] = {
        {8, 0, 0, 8, 0, 0, 0, 0},   {8, 0, 0, 8, 0, 0, 1, 0},    {8, 0, 0, 8, 0, 0, 0, 1},   {8, 0, 0, 8, 0, 0, 1, 1},
        {24, 0, 0, 17, 0, 0, 0, 0}, {24, 5, 3, 17, 2, 7, 0, 0},  {24, 5, 3, 17, 2, 7, 1, 0}, {24, 5, 3, 17, 2, 7, 0, 1},
        {0, 3, 0, 8, 0, 0, 0, 0},   {1, 0, 0, 24, 16, 13, 0, 0},
    };
    (void)state;
    for (int type = FLOAT; type <= BFLOAT; type++)
        for (int local = 0; local < 2; local++)
            for (size_t b = 0; b < BUILDS; b++) {
                char defines[128];
                snprintf(defines, sizeof defines, "LEFT %s\nRESULT LEFT\nRIGHT LEFT\nADDED LEFT\nSIZE %d\n%s",
                         type_names[type], SIZE, local ? "LOCAL" : "");
                metalsim_library *library = support_load("simdgroup.metal", defines, builds[b]);
                for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
                    check_copy(library, (enum type)type, cases[i], local);
                metalsim_library_destroy(library);
            }
}

/* -- Products -- */

static void check_product(const metalsim_library *library, const enum type types[4])
{
    _Alignas(16) unsigned char A[256], B[256], C[256], D[256], alone[256];
    float a[64], b[64], c[64];
    for (int i = 0; i < 64; i++) {
        put(A, types[1], (size_t)i, a[i] = (float)(i * 5 % 7 - 3));
        put(B, types[2], (size_t)i, b[i] = (float)(i * 3 % 5 - 1));
        put(C, types[3], (size_t)i, c[i] = (float)(i % 32));
    }
    run(library, "product",
        (struct metalsim_dispatch){
            .buffers = {support_buffer(A, 64 * size_of(types[1])), support_buffer(B, 64 * size_of(types[2])),
                        support_buffer(C, 64 * size_of(types[3])), support_output(D, 64 * size_of(types[0])),
                        support_output(alone, 64 * size_of(types[0]))},
        });
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) {
            float sum = 0;
            for (int k = 0; k < 8; k++)
                sum += a[8 * i + k] * b[8 * k + j];
            assert_true(get(alone, types[0], (size_t)(8 * i + j)) == sum);
            assert_true(get(D, types[0], (size_t)(8 * i + j)) == sum + c[8 * i + j]);
        }
}

static void test_product(void **state)
{
    const enum type cases[][4] = {
        {FLOAT, FLOAT, FLOAT, FLOAT}, {FLOAT, HALF, HALF, FLOAT},       {FLOAT, BFLOAT, BFLOAT, FLOAT},
        {HALF, HALF, HALF, HALF},     {BFLOAT, BFLOAT, BFLOAT, BFLOAT}, {FLOAT, FLOAT, HALF, FLOAT},
        {HALF, FLOAT, HALF, FLOAT},   {BFLOAT, HALF, BFLOAT, FLOAT},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t b = 0; b < BUILDS; b++) {
            char defines[128];
            snprintf(defines, sizeof defines, "RESULT %s\nLEFT %s\nRIGHT %s\nADDED %s\nSIZE 64",
                     type_names[cases[i][0]], type_names[cases[i][1]], type_names[cases[i][2]],
                     type_names[cases[i][3]]);
            metalsim_library *library = support_load("simdgroup.metal", defines, builds[b]);
            check_product(library, cases[i]);
            metalsim_library_destroy(library);
        }
}

/* -- Where elements lie -- */

static void test_elements(void **state)
{
    /* Row 0 lies in lanes 0, 1, 8, 9; the rest of the upper half follows in lanes 2 to 7 and 10 to 15. */
    const int row_of_lane[32] = {0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3,
                                 4, 4, 5, 5, 6, 6, 7, 7, 4, 4, 5, 5, 6, 6, 7, 7};
    const int column_of_lane[32] = {0, 2, 0, 2, 0, 2, 0, 2, 4, 6, 4, 6, 4, 6, 4, 6,
                                    0, 2, 0, 2, 0, 2, 0, 2, 4, 6, 4, 6, 4, 6, 4, 6};
    (void)state;
    for (size_t b = 0; b < BUILDS; b++) {
        metalsim_library *library = support_load("simdgroup.metal", ALL_FLOAT, builds[b]);
        float from[64], to[256], back[64];
        for (int i = 0; i < 64; i++)
            from[i] = (float)i;
        run(library, "elements",
            (struct metalsim_dispatch){
                .buffers = {support_buffer(from, sizeof from), support_output(to, sizeof to),
                            support_output(back, sizeof back)},
            });
        for (int i = 0; i < 64; i++) {
            int row = row_of_lane[i / 2], column = column_of_lane[i / 2] + i % 2;
            assert_true(to[i] == (float)(8 * row + column));
            assert_true(to[64 + i] == (row == column ? 3.0f : 0.0f));
            assert_true(to[128 + i] == 5.0f);
            assert_true(isnan(to[192 + i]));
            assert_true(back[8 * row + column] == (float)i);
        }
        metalsim_library_destroy(library);
    }
}

/* -- Functions -- */

#define FUNCTIONS 22

static void expect(float expected[FUNCTIONS][32], const float *x)
{
    float sum = 0, most = x[0], least = x[0], prefix = 0;
    for (int l = 0; l < 32; l++)
        sum += x[l], most = fmaxf(most, x[l]), least = fminf(least, x[l]);
    for (int l = 0; l < 32; l++) {
        const float row[FUNCTIONS] = {
            x[l * 7 % 32],
            x[l ^ 1],
            x[l ^ 8],
            x[l ^ 31],
            l < 3 ? x[l] : x[l - 3],
            l > 26 ? x[l] : x[l + 5],
            x[(l + 29) % 32],
            x[(l + 5) % 32],
            x[17],
            x[0],
            sum,
            most,
            least,
            prefix + x[l],
            prefix,
            0,
            1,
            1,
            0,
            x[0] * x[1] * x[2],
            (float)(l ^ 2),
            l == 0,
        };
        prefix += x[l];
        for (int f = 0; f < FUNCTIONS; f++)
            expected[f][l] = row[f];
    }
}

static void test_functions(void **state)
{
    (void)state;
    for (int type = FLOAT; type <= HALF; type++)
        for (size_t b = 0; b < BUILDS; b++) {
            char defines[64];
            snprintf(defines, sizeof defines, "LEFT %s\nRESULT LEFT\nRIGHT LEFT\nADDED LEFT\nSIZE 64",
                     type_names[type]);
            metalsim_library *library = support_load("simdgroup.metal", defines, builds[b]);
            _Alignas(16) unsigned char from[128], to[FUNCTIONS * 128];
            float x[32], expected[FUNCTIONS][32];
            for (int l = 0; l < 32; l++)
                put(from, (enum type)type, (size_t)l, x[l] = (float)(l * 11 % 32 - 9));
            expect(expected, x);
            size_t bytes = 32 * size_of((enum type)type);
            run(library, "functions",
                (struct metalsim_dispatch){
                    .buffers = {support_buffer(from, bytes), support_output(to, FUNCTIONS * bytes)},
                });
            for (int f = 0; f < FUNCTIONS; f++)
                for (int l = 0; l < 32; l++)
                    if (get(to, (enum type)type, (size_t)(f * 32 + l)) != expected[f][l])
                        fail_msg("%s, function %d, lane %d: %g, expected %g", type_names[type], f, l,
                                 (double)get(to, (enum type)type, (size_t)(f * 32 + l)), (double)expected[f][l]);
            metalsim_library_destroy(library);
        }
}

static void test_bits(void **state)
{
    uint32_t from[32], to[96], every = ~0u, some = 0, odd = 0;
    (void)state;
    metalsim_library *library = support_load("simdgroup.metal", ALL_FLOAT, 0);
    for (uint32_t l = 0; l < 32; l++) {
        from[l] = l * 2654435761u | 0x10;
        every &= from[l], some |= from[l], odd ^= from[l];
    }
    run(library, "bits",
        (struct metalsim_dispatch){
            .buffers = {support_buffer(from, sizeof from), support_output(to, sizeof to)},
        });
    for (int l = 0; l < 32; l++) {
        assert_int_equal(to[l], every);
        assert_int_equal(to[32 + l], some);
        assert_int_equal(to[64 + l], odd);
    }
    metalsim_library_destroy(library);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copy),      cmocka_unit_test(test_product), cmocka_unit_test(test_elements),
        cmocka_unit_test(test_functions), cmocka_unit_test(test_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
