/* The products of product.h by tile registers: C is made of squares of LANES x LANES sums, two by two of them at a time
 * in registers 0 to 3, and each step takes LANES terms. So A is read in whole squares, and C written in whole ones:
 * memory has room for them, and the terms beyond n are 0 in one operand and finite in the other. */

#define SQUARE(C, row, column, c_step) ((C) + ((row) * (c_step) + (column)) * LANES)

/* Compilers may not know that loads of tile registers read memory. */
#define MEMORY_IS_WRITTEN() atomic_signal_fence(memory_order_seq_cst)

/* `rows` by `columns` squares of C, each 1 or 2: the sums from C, or 0; some terms of A B; and the sums to C. */
static inline __attribute__((always_inline)) void squares_load(int rows, int columns, const real *C, int64_t c_step,
                                                               int add)
{
    const size_t bytes = (size_t)c_step * sizeof(real);
    MEMORY_IS_WRITTEN();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!add)
        return;
    _tile_loadd(0, C, bytes);
    if (columns == 2)
        _tile_loadd(1, SQUARE(C, 0, 1, c_step), bytes);
    if (rows == 2)
        _tile_loadd(2, SQUARE(C, 1, 0, c_step), bytes);
    if (rows == 2 && columns == 2)
        _tile_loadd(3, SQUARE(C, 1, 1, c_step), bytes);
}

static inline __attribute__((always_inline)) void squares_add(int rows, int columns, const term *A, int64_t a_step,
                                                              const term *B, int64_t b_step, int64_t n)
{
    const size_t a_bytes = (size_t)a_step * sizeof(term), b_bytes = (size_t)b_step * sizeof(term);
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
}

static inline __attribute__((always_inline)) void squares_store(int rows, int columns, real *C, int64_t c_step)
{
    const size_t bytes = (size_t)c_step * sizeof(real);
    _tile_stored(0, C, bytes);
    if (columns == 2)
        _tile_stored(1, SQUARE(C, 0, 1, c_step), bytes);
    if (rows == 2)
        _tile_stored(2, SQUARE(C, 1, 0, c_step), bytes);
    if (rows == 2 && columns == 2)
        _tile_stored(3, SQUARE(C, 1, 1, c_step), bytes);
}

static inline __attribute__((always_inline)) void squares(int rows, int columns, const term *A, int64_t a_step,
                                                          const term *B, int64_t b_step, real *C, int64_t c_step,
                                                          int64_t n, int add)
{
    squares_load(rows, columns, C, c_step, add);
    squares_add(rows, columns, A, a_step, B, b_step, n);
    squares_store(rows, columns, C, c_step);
}

/* Down a column of squares, so that those of B stay in the first cache, which the terms of A pass through. */
static void tile_product(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step,
                         real *C, int64_t c_step, int64_t n, int add)
{
    for (int v = 0; v < vectors; v += 2, B += 2 * LANES, C += 2 * LANES)
        for (int64_t r = 0; r < rows; r += 2 * LANES) {
            const term *a = A + r * a_step;
            real *c = C + r * c_step;
            if (rows - r > LANES && v + 1 < vectors)
                squares(2, 2, a, a_step, B, b_step, c, c_step, n, add);
            else if (rows - r > LANES)
                squares(2, 1, a, a_step, B, b_step, c, c_step, n, add);
            else if (v + 1 < vectors)
                squares(1, 2, a, a_step, B, b_step, c, c_step, n, add);
            else
                squares(1, 1, a, a_step, B, b_step, c, c_step, n, add);
        }
}

/* Part v of a product of 2 * LANES rows and PANEL columns: parts can be put between other work, in order. */
static inline void tile_product_part(int v, const term *A, int64_t a_step, const term *B, real *C, int64_t n)
{
    int64_t half = n / 2 / LANES * LANES, from = v % 2 ? half : 0;
    B += v / 2 * 2 * LANES, C += v / 2 * 2 * LANES;
    if (v % 2 == 0)
        squares_load(2, 2, C, PANEL, 0);
    squares_add(2, 2, A + from, a_step, B + from * PANEL, PANEL, (v % 2 ? n : half) - from);
    if (v % 2)
        squares_store(2, 2, C, PANEL);
}

static void multiply_rows(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step,
                          real *C, int64_t c_step, int64_t n, real factor, struct upcoming *upcoming)
{
    (void)upcoming; /* in whole squares there is nothing to be asked for evenly */
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
                        real *C, int64_t c_step, int64_t n, struct upcoming *upcoming)
{
    (void)upcoming;
    tile_product(rows, vectors, A, a_step, B, b_step, C, c_step, n, 1);
}
