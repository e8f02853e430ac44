/* Template of decode.h: COLUMNS, O += P V for all columns: by tiles of WIDE and of MIDDLE vectors, then of one. */

static inline __attribute__((always_inline)) void COLUMNS(const packed *P, struct kv_rows V, int64_t n, int64_t columns,
                                                          real *O, struct prefetch_cursor *next)
{
    int64_t c = 0;
    for (; WIDE > MIDDLE && c + WIDE * LANES <= columns; c += WIDE * LANES)
        WIDE_TILE(P, V, n, O, columns, c, 0, next);
    for (; MIDDLE > 1 && c + MIDDLE * LANES <= columns; c += MIDDLE * LANES)
        MIDDLE_TILE(P, V, n, O, columns, c, 0, next);
    const int halves = K_PACK > 1 || (is_nibbles(V.dtype) && 2 * LANES == MFA_KV_BLOCK) ? 2 : 1;
    for (; c < columns; c += halves * LANES) {
        NARROW_TILE(P, V, n, O, columns, c, 0, next);
        if (halves > 1)
            NARROW_TILE(P, V, n, O, columns, c + LANES, 1, next);
    }
}

#undef COLUMNS
#undef WIDE_TILE
#undef WIDE
#undef MIDDLE_TILE
#undef MIDDLE
#undef NARROW_TILE
