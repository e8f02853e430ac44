#include "tiles.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/amx.h"

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

struct config { /* as LDTILECFG reads it */
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* A thread's own, as the registers are. Palette 0: no tile may be used. */
static _Thread_local struct {
    struct config config;
    union {
        uint16_t numbers[ROWS][ROW_BYTES / 2];
        float sums[ROWS][ROW_BYTES / 4];
    } tiles[TILES];
} state;

int mfa_cpu_amx_present(void)
{
    return 1;
}

static void stop_unless(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "emulated AMX: %s\n", what);
    abort();
}

void tiles_configure(const void *from)
{
    memcpy(&state.config, from, sizeof state.config);
    stop_unless(state.config.palette == 1 && state.config.start_row == 0, "the palette must be 1, the start row 0");
    for (int i = 0; i < 16; i++)
        stop_unless(state.config.row_bytes[i] <= (i < TILES ? ROW_BYTES : 0) &&
                        state.config.rows[i] <= (i < TILES ? ROWS : 0),
                    "a tile has at most 16 rows of 64 bytes, and there are 8");
    memset(state.tiles, 0, sizeof state.tiles);
}

void tiles_release(void)
{
    memset(&state, 0, sizeof state);
}

static void check(int tile)
{
    stop_unless(state.config.palette == 1 && state.config.rows[tile] > 0, "a tile is used that is not configured");
}

void tiles_zero(int tile)
{
    check(tile);
    memset(&state.tiles[tile], 0, sizeof state.tiles[tile]);
}

void tiles_load(int tile, const void *from, size_t stride)
{
    tiles_zero(tile);
    for (int r = 0; r < state.config.rows[tile]; r++)
        memcpy(state.tiles[tile].numbers[r], (const char *)from + (size_t)r * stride, state.config.row_bytes[tile]);
}

void tiles_store(int tile, void *to, size_t stride)
{
    check(tile);
    for (int r = 0; r < state.config.rows[tile]; r++)
        memcpy((char *)to + (size_t)r * stride, state.tiles[tile].numbers[r], state.config.row_bytes[tile]);
}

/* What is subnormal counts as 0, going in and coming out. */
static inline __attribute__((always_inline)) float flushed(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= bits & UINT32_C(0x7f800000) ? UINT32_MAX : UINT32_C(0x80000000);
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline __attribute__((always_inline)) float widened(uint16_t number)
{
    uint32_t bits = (uint32_t)number << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return flushed(x);
}

/* TDPBF16PS: for each pair along a row of A, its products with the pair of B's row are added one after the other. Tests
 * on emulated registers spend nine tenths of their time here, so it is vectorised: without FMA, which rounds once. */
__attribute__((target("avx2"))) void tiles_add_product(int sums, int a, int b)
{
    check(sums), check(a), check(b);
    const int rows = state.config.rows[sums], columns = state.config.row_bytes[sums] / 4;
    const int pairs = state.config.row_bytes[a] / 4;
    stop_unless(state.config.rows[a] == rows && state.config.rows[b] == pairs &&
                    state.config.row_bytes[b] == state.config.row_bytes[sums],
                "the shapes of a product do not fit");
    float right[ROWS][2][ROW_BYTES / 4];
    for (int k = 0; k < pairs; k++)
        for (int n = 0; n < columns; n++)
            for (int half = 0; half < 2; half++)
                right[k][half][n] = widened(state.tiles[b].numbers[k][2 * n + half]);
    for (int m = 0; m < rows; m++) {
        float sum[ROW_BYTES / 4];
        memcpy(sum, state.tiles[sums].sums[m], sizeof sum);
        for (int k = 0; k < pairs; k++) {
            const float first = widened(state.tiles[a].numbers[m][2 * k]);
            const float second = widened(state.tiles[a].numbers[m][2 * k + 1]);
            for (int n = 0; n < columns; n++)
                sum[n] = flushed(flushed(sum[n] + first * right[k][0][n]) + second * right[k][1][n]);
        }
        memcpy(state.tiles[sums].sums[m], sum, sizeof sum);
    }
}
