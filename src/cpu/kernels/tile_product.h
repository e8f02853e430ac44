/* The products of product.h by tile registers: C is made of squares of LANES x LANES sums, two by two of them at a time
 * in registers 0 to 3, and each step takes LANES terms. So A is read in whole squares, and C written in whole ones:
 * memory has room for them, and the terms beyond n are 0 in one operand and finite in the other. */

#define SQUARE(C, row, column, c_step) ((C) + ((row) * (c_step) + (column)) * LANES)

static inline __attribute__((always_inline)) void squares(int rows, int columns, const term *A, int64_t a_step,
                                                          const term *B, int64_t b_step, real *C, int64_t c_step,
                                                          int64_t n, int add)
{
    const size_t a_bytes = (size_t)a_step * sizeof(term), b_bytes = (size_t)b_step * sizeof(term);
    const size_t c_bytes = (size_t)c_step * sizeof(real);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
        _tile_loadd(0, C, c_bytes);
        if (columns == 2)
            _tile_loadd(1, SQUARE(C, 0, 1, c_step), c_bytes);
        if (rows == 2)
            _tile_loadd(2, SQUARE(C, 1, 0, c_step), c_bytes);
        if (rows == 2 && columns == 2)
            _tile_loadd(3, SQUARE(C, 1, 1, c_step), c_bytes);
    }
    for (int64_t t = 0; t < n; t += LANES, A += LANES, B += LANES * b_step) {
        _tile_loadd(4, A, a_bytes);
        _tile_loadd(6, B, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (columns == 2) {
            _tile_loadd(7, B + LANES, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (rows == 2) {
            _tile_loadd(5, A + LANES * a_step, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if (columns == 2)
                _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, C, c_bytes);
    if (columns == 2)
        _tile_stored(1, SQUARE(C, 0, 1, c_step), c_bytes);
    if (rows == 2)
        _tile_stored(2, SQUARE(C, 1, 0, c_step), c_bytes);
    if (rows == 2 && columns == 2)
        _tile_stored(3, SQUARE(C, 1, 1, c_step), c_bytes);
}

static void tile_product(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step,
                         real *C, int64_t c_step, int64_t n, int add)
{
    for (; rows > 0; rows -= 2 * LANES, A += 2 * LANES * a_step, C += 2 * LANES * c_step)
        for (int v = 0; v < vectors; v += 2)
            if (rows > LANES && v + 1 < vectors)
                squares(2, 2, A, a_step, B + v * LANES, b_step, C + v * LANES, c_step, n, add);
            else if (rows > LANES)
                squares(2, 1, A, a_step, B + v * LANES, b_step, C + v * LANES, c_step, n, add);
            else if (v + 1 < vectors)
                squares(1, 2, A, a_step, B + v * LANES, b_step, C + v * LANES, c_step, n, add);
            else
                squares(1, 1, A, a_step, B + v * LANES, b_step, C + v * LANES, c_step, n, add);
}

static void multiply_rows(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step,
                          real *C, int64_t c_step, int64_t n, real factor)
{
    tile_product(rows, vectors, A, a_step, B, b_step, C, c_step, n, 0);
    if (factor == 1)
        return;
    for (int64_t r = 0; r < rows; r++)
        scale_vectors(C + r * c_step, vectors * LANES, factor);
}

static void add_rows(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step, real *C,
                     int64_t c_step, int64_t n)
{
    tile_product(rows, vectors, A, a_step, B, b_step, C, c_step, n, 1);
}

/* A comes turned (terms.h): so this is the same. */
static void add_columns(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step,
                        real *C, int64_t c_step, int64_t n)
{
    tile_product(rows, vectors, A, a_step, B, b_step, C, c_step, n, 1);
}
