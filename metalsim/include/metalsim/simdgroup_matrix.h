/* 8x8 matrices spread over the lanes of a simdgroup, two neighbours of a row in each lane. Where they lie
 * is Apple's secret in theory and used by every fast kernel in practice: of lane l, with q = l / 4,
 *     row = (q & 4) + (l / 2) % 4,   columns (q & 2) * 2 + (l % 2) * 2 and the one after it. */
#ifndef METALSIM_SIMDGROUP_MATRIX_H
#define METALSIM_SIMDGROUP_MATRIX_H

namespace metalsim
{

struct fragment {
    uint row, column;
};

METALSIM_OURS fragment own_fragment()
{
    uint l = own_lane(), q = l / 4;
    return {(q & 4) + l / 2 % 4, (q & 2) * 2 + l % 2 * 2};
}

/* An unwritten matrix holds NaNs. */
template <class T> METAL_FUNC T unwritten()
{
    return __builtin_bit_cast(T, typename metal::conditional < sizeof(T) == 4, uint, ushort > ::type(~0u));
}

#if !defined(METALSIM_COUNTED)
struct matrix_slots {
    float a[8][8], b[8][8], c[8][8];
};
static_assert(sizeof(matrix_slots) <= METALSIM_SLOTS, "three matrices fit into the slots");

typedef float row8 __attribute__((ext_vector_type(8), aligned(32)));

/* c = a b + c, for all lanes at once. */
METALSIM_OURS static void multiply_accumulate(unsigned char *slots)
{
    matrix_slots *m = (matrix_slots *)slots;
    for (int i = 0; i < 8; i++) {
        row8 sum = *(row8 *)m->c[i];
        for (int k = 0; k < 8; k++)
            sum = __builtin_elementwise_fma(row8(m->a[i][k]), *(row8 *)m->b[k], sum);
        *(row8 *)m->c[i] = sum;
    }
}

METALSIM_OURS void give_matrices(metal::vec<float, 2> a, metal::vec<float, 2> b, metal::vec<float, 2> c)
{
    matrix_slots *m = (matrix_slots *)slots_to_give();
    fragment f = own_fragment();
    *(metal::vec<float, 2> *)&m->a[f.row][f.column] = a;
    *(metal::vec<float, 2> *)&m->b[f.row][f.column] = b;
    *(metal::vec<float, 2> *)&m->c[f.row][f.column] = c;
}

METALSIM_OURS metal::vec<float, 2> take_matrix()
{
    fragment f = own_fragment();
    return *(metal::vec<float, 2> *)&((matrix_slots *)slots_to_take())->c[f.row][f.column];
}

/* a b + c: of three matrices, each lane's elements. */
METAL_FUNC metal::vec<float, 2> multiply_add(metal::vec<float, 2> a, metal::vec<float, 2> b, metal::vec<float, 2> c)
{
    give_matrices(a, b, c);
    meet(multiply_accumulate);
    return take_matrix();
}
#endif

/* Loads and stores are a matter of each lane alone, so only a checked library has the lanes meet for them,
 * to see that all are there and mean the same place. */
#if defined(METALSIM_CHECKED)
METALSIM_OURS static void compare_places(unsigned char *slots)
{
    for (int i = 1; i < 32; i++)
        if (__builtin_memcmp(slots, slots + 16 * i, sizeof(ulong)))
            metalsim_functions.undefined("the lanes of a simdgroup give different addresses for one matrix", nullptr);
}
#define METALSIM_UNIFORM(pointer)                 \
    do {                                          \
        metalsim::give((ulong)(pointer));         \
        metalsim::meet(metalsim::compare_places); \
    } while (0)
#else
#define METALSIM_UNIFORM(pointer)
#endif

#if defined(METALSIM_COUNTED) /* what is added to an address is counted as 32 bits */
typedef uint matrix_offset;
#else
typedef ulong matrix_offset;
#endif

/* Where this lane's two elements of a matrix in memory are, and how far apart; as Metal does, the origin counts in the
 * memory's rows and columns also when the matrix is read transposed. */
struct elements {
    matrix_offset first, step;
};

METALSIM_OURS elements own_elements(matrix_offset elements_per_row, metal::vec<ulong, 2> origin, bool transposed)
{
    fragment f = own_fragment();
    matrix_offset base = matrix_offset(origin.y) * elements_per_row + matrix_offset(origin.x);
    if (transposed)
        return {base + f.column * elements_per_row + f.row, elements_per_row};
    return {base + f.row * elements_per_row + f.column, 1};
}

} // namespace metalsim

namespace metal
{

template <class T, int Columns, int Rows> struct simdgroup_matrix {
    static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8x8");
    static_assert(is_same<T, float>::value || is_same<T, half>::value || is_same<T, bfloat>::value,
                  "simdgroup matrices hold float, half or bfloat");
    typedef vec<T, 2> storage_type;
    storage_type elements;

    METAL_FUNC simdgroup_matrix()
    {
        elements[0] = elements[1] = metalsim::unwritten<T>();
    }
    METAL_FUNC explicit simdgroup_matrix(T diagonal)
    {
        metalsim::fragment f = metalsim::own_fragment();
        elements[0] = f.row == f.column ? diagonal : T(0.0f);
        elements[1] = f.row == f.column + 1 ? diagonal : T(0.0f);
    }
    METAL_FUNC storage_type &thread_elements()
    {
        return elements;
    }
    METAL_FUNC const storage_type &thread_elements() const
    {
        return elements;
    }
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows>
METAL_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T x)
{
    simdgroup_matrix<T, Columns, Rows> m;
    m.elements[0] = m.elements[1] = x;
    return m;
}

#define METALSIM_LOAD_STORE(space)                                                                                  \
    template <class T>                                                                                              \
    METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8> &d, const space T *source, ulong elements_per_row = 8, \
                                   vec<ulong, 2> origin = 0, bool transpose_matrix = false)                         \
    {                                                                                                               \
        METALSIM_UNIFORM(source);                                                                                   \
        metalsim::elements e = metalsim::own_elements(elements_per_row, origin, transpose_matrix);                  \
        const space T *own = source + e.first;                                                                      \
        d.elements[0] = own[0];                                                                                     \
        d.elements[1] = own[e.step];                                                                                \
    }                                                                                                               \
    template <class T>                                                                                              \
    METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> a, space T *destination, ulong elements_per_row = 8,  \
                                    vec<ulong, 2> origin = 0, bool transpose_matrix = false)                        \
    {                                                                                                               \
        METALSIM_UNIFORM(destination);                                                                              \
        metalsim::elements e = metalsim::own_elements(elements_per_row, origin, transpose_matrix);                  \
        space T *own = destination + e.first;                                                                       \
        own[0] = a.elements[0];                                                                                     \
        own[e.step] = a.elements[1];                                                                                \
    }
METALSIM_LOAD_STORE(device)
METALSIM_LOAD_STORE(threadgroup)
#undef METALSIM_LOAD_STORE

/* d = a b + c. The four element types are independent, products and sums are float. */
template <class R, class T, class U, class V>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<R, 8, 8> &d, simdgroup_matrix<T, 8, 8> a,
                                              simdgroup_matrix<U, 8, 8> b, simdgroup_matrix<V, 8, 8> c)
{
    vec<float, 2> sums = metalsim::multiply_add(vec<float, 2>{float(a.elements[0]), float(a.elements[1])},
                                                vec<float, 2>{float(b.elements[0]), float(b.elements[1])},
                                                vec<float, 2>{float(c.elements[0]), float(c.elements[1])});
    d.elements[0] = R(sums[0]);
    d.elements[1] = R(sums[1]);
}

template <class R, class T, class U>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<R, 8, 8> &d, simdgroup_matrix<T, 8, 8> a,
                                   simdgroup_matrix<U, 8, 8> b)
{
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}

} // namespace metal
#endif
