/* AVX-512 with BF16, and the tile registers of AMX (AMX_TILE, AMX_BF16) for the products of long sequences. A register
 * holds 16 rows of 64 bytes: of a left operand, of a right one, or of C (gemm/layout.h). gemm/amx.h uses them. */
#include "cpu/kernels/simd/avx512bf16.h"

#define USE_AMX 1
#define PANEL_VECTORS 4 /* two pairs of registers */
#define QUERY_VECTORS 2 /* of the sums over queries, which take LANES packs at once */
#define KEY_UNIT 32     /* likewise over keys */
#define MASK_GRANULE 64

/* In the place of avx512bf16.h's, whose permutations take longer here: half of a unit in the last place is added,
 * so that ties go away from 0. */
static inline vec rounded_pair(vec even, vec odd)
{
    __m512i half = _mm512_set1_epi32(0x8000);
    __m512i low = _mm512_add_epi32((__m512i)even, half), high = _mm512_add_epi32((__m512i)odd, half);
    return (vec)_mm512_mask_blend_epi16(0x55555555, high, _mm512_srli_epi32(low, 16));
}

#define vec_pair rounded_pair

/* That carries a NaN whose last bits are set on to 0. What the caller gives in f32, n whole vectors of it, gets another
 * NaN in its place; operands in bf16, and what is computed of them, have none such. */
static inline void quiet_nans(real *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 v = _mm512_loadu_ps(x + i);
        _mm512_mask_storeu_ps(x + i, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_ps(NAN));
    }
}

/* Every register whole: what is beside a matrix is zero in memory. A task begins with this and ends with the other, for
 * the state is the thread's. */
static inline void gemm_begin(void)
{
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } whole = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&whole);
}

static inline void gemm_end(void)
{
    _tile_release();
}
