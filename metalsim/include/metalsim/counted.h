/* What metalsim/cost needs of a kernel that it counts. The kernel is compiled twice.
 *
 * With METALSIM_COUNTED it is optimised as for a GPU: here every operation of a simdgroup is a call of a function that
 * the compiler knows nothing about, so the optimised code has each as often as a GPU would execute it.
 * Without, the rest of the library is compiled as always: here these functions are defined, by metalsim's own, and
 * counts are kept for each lane. So what is counted is also right. */
#ifndef METALSIM_COUNTED_H
#define METALSIM_COUNTED_H

/* name, type, operation of the reductions */
#define METALSIM_REDUCTIONS(X)   \
    X(sum_float, float, add)     \
    X(max_float, float, larger)  \
    X(min_float, float, smaller) \
    X(sum_int, int, add)         \
    X(max_int, int, larger)      \
    X(min_int, int, smaller)     \
    X(sum_uint, uint, add)       \
    X(max_uint, uint, larger)    \
    X(min_uint, uint, smaller)   \
    X(and_uint, uint, both)      \
    X(or_uint, uint, either)     \
    X(xor_uint, uint, differ)

#if defined(METALSIM_COUNTED)

#define METALSIM_PURE __attribute__((const, convergent, nomerge, nothrow))
#define METALSIM_SYNC __attribute__((convergent, nomerge, nothrow))
#define METALSIM_DECLARE(name, T, F) METALSIM_PURE T cost_##name(T x);

extern "C" {
METALSIM_PURE metal::vec<float, 2> cost_multiply_add(metal::vec<float, 2> a, metal::vec<float, 2> b,
                                                     metal::vec<float, 2> c);
METALSIM_PURE uint cost_shuffle(uint x, uint from);
METALSIM_PURE uint cost_shuffle_xor(uint x, uint mask);
METALSIM_PURE uint cost_ballot(bool x);
METALSIM_REDUCTIONS(METALSIM_DECLARE)
__attribute__((const, nothrow)) uint cost_own_lane();
__attribute__((const, nothrow)) threadgroup void *cost_threadgroup_array(const char *name);
METALSIM_SYNC void cost_threadgroup_barrier(uint memory);
METALSIM_SYNC void cost_simdgroup_barrier(uint memory);
}

namespace metalsim
{

METAL_FUNC uint own_lane()
{
    return cost_own_lane() & 31;
}

METAL_FUNC threadgroup void *find_array(const char *name)
{
    return cost_threadgroup_array(name);
}

METAL_FUNC void threadgroup_barrier(uint memory)
{
    cost_threadgroup_barrier(memory);
}

METAL_FUNC void simdgroup_barrier(uint memory)
{
    cost_simdgroup_barrier(memory);
}

/* A shuffle of 32 bits for each element. */
template <class T> struct shuffled {
    template <class F> static METAL_FUNC T by(F shuffle, T x, uint lane)
    {
        static_assert(sizeof(T) == 2 || sizeof(T) == 4, "values of 16 and 32 bits are shuffled");
        typedef typename metal::conditional<sizeof(T) == 2, ushort, uint>::type bits;
        return __builtin_bit_cast(T, bits(shuffle(__builtin_bit_cast(bits, x), lane)));
    }
};
template <class T, int N> struct shuffled<metal::vec<T, N>> {
    template <class F> static METAL_FUNC metal::vec<T, N> by(F shuffle, metal::vec<T, N> x, uint lane)
    {
        for (int i = 0; i < N; i++)
            x[i] = shuffled<T>::by(shuffle, x[i], lane);
        return x;
    }
};

template <class T> METAL_FUNC T exchange(T x, uint from)
{
    return shuffled<T>::by(cost_shuffle, x, from);
}

template <class T> METAL_FUNC T exchange_xor(T x, uint mask)
{
    return shuffled<T>::by(cost_shuffle_xor, x, mask);
}

METAL_FUNC uint ballot(bool x)
{
    return cost_ballot(x);
}

#define METALSIM_REDUCE(name, T, F) \
    METAL_FUNC T reduce(T x, F)     \
    {                               \
        return cost_##name(x);      \
    }
METALSIM_REDUCTIONS(METALSIM_REDUCE)
#undef METALSIM_REDUCE

METAL_FUNC metal::vec<float, 2> multiply_add(metal::vec<float, 2> a, metal::vec<float, 2> b, metal::vec<float, 2> c)
{
    return cost_multiply_add(a, b, c);
}

} // namespace metalsim

#else

extern "C" {

void *calloc(ulong count, ulong size);
char *getenv(const char *name);
void *fopen(const char *path, const char *mode);
int fprintf(void *file, const char *format, ...);
int fclose(void *file);

metal::vec<float, 2> cost_multiply_add(metal::vec<float, 2> a, metal::vec<float, 2> b, metal::vec<float, 2> c)
{
    return metalsim::multiply_add(a, b, c);
}

uint cost_shuffle(uint x, uint from)
{
    return metalsim::exchange(x, from);
}

uint cost_shuffle_xor(uint x, uint mask)
{
    return metalsim::exchange_xor(x, mask);
}

uint cost_ballot(bool x)
{
    return metalsim::ballot(x);
}

#define METALSIM_DEFINE(name, T, F)                \
    T cost_##name(T x)                             \
    {                                              \
        return metalsim::reduce(x, metalsim::F()); \
    }
METALSIM_REDUCTIONS(METALSIM_DEFINE)
#undef METALSIM_DEFINE

uint cost_mulhi(uint x, uint y)
{
    return metal::mulhi(x, y);
}

uint cost_own_lane()
{
    return metalsim::own_lane();
}

threadgroup void *cost_threadgroup_array(const char *name)
{
    return (threadgroup void *)metalsim::find_array(name);
}

void cost_threadgroup_barrier(uint memory)
{
    metalsim::threadgroup_barrier(memory);
}

void cost_simdgroup_barrier(uint memory)
{
    metalsim::simdgroup_barrier(memory);
}

} // extern "C"

namespace metalsim
{

/* How often each lane of a simdgroup executed each block of the kernel's code. */
struct block_counts {
    block_counts *next;
    ulong blocks;
    ulong *counts; /* of lane 0, then of lane 1 ... */
};
static block_counts *counted_simdgroups;

static block_counts *add_simdgroup(ulong blocks)
{
    block_counts *added = (block_counts *)calloc(1, sizeof *added);
    added->blocks = blocks;
    added->counts = (ulong *)calloc(32 * blocks, sizeof(ulong));
    added->next = __atomic_load_n(&counted_simdgroups, __ATOMIC_ACQUIRE);
    while (!__atomic_compare_exchange_n(&counted_simdgroups, &added->next, added, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE))
        ;
    return added;
}

/* Adds to the file METALSIM_COUNTS a line: the kernel's code, the number of simdgroups, and for each block of the code
 * how often they executed it. A simdgroup executes what any of its lanes does. */
__attribute__((destructor)) static void write_counts()
{
    const char *path = getenv("METALSIM_COUNTS");
    void *file = path && counted_simdgroups ? fopen(path, "a") : nullptr;
    if (!file)
        return;
    ulong simdgroups = 0;
    for (block_counts *s = counted_simdgroups; s; s = s->next)
        simdgroups++;
    fprintf(file, "%s %lu", METALSIM_CODE, simdgroups);
    for (ulong block = 0; block < counted_simdgroups->blocks; block++) {
        ulong sum = 0;
        for (block_counts *s = counted_simdgroups; s; s = s->next) {
            ulong most = 0;
            for (uint lane = 0; lane < 32; lane++)
                most = metal::max(most, s->counts[lane * s->blocks + block]);
            sum += most;
        }
        fprintf(file, " %lu", sum);
    }
    fprintf(file, "\n");
    fclose(file);
}

} // namespace metalsim

/* Called at the kernel's beginning: the counts of the calling lane. */
extern "C" ulong *cost_begin(ulong blocks)
{
    uint lane = metalsim::own_lane();
    metalsim::give(lane == 0 ? (ulong)metalsim::add_simdgroup(blocks)->counts : 0);
    metalsim::meet(nullptr);
    return (ulong *)metalsim::take<ulong>(0) + lane * blocks;
}

#endif
#endif
