/* The peak of this machine, with which a measured speed is compared: multiply-adds in f32, dot products of bf16, and
 * bytes read from memory, on all threads at once. A probe takes a few milliseconds, so that one can be run just
 * before and one just after each measurement: on a shared machine the clock frequency varies, and the share of the
 * peak at the same moment varies much less. Loaded by bench/measure.py through ctypes; not part of libmfa. */
#define _GNU_SOURCE /* clock_gettime and syscall under a strict -std=c11 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT __attribute__((visibility("default")))

/* The widest vectors that mfa_peak_gflops can probe here, in bits; 0: none. */
EXPORT int mfa_peak_vector_bits(void);

/* 10^9 multiplications and additions a second, with vectors of 512, 256 or 128 bits; 0 if this machine has
 * no such vectors, or threads cannot be started. */
EXPORT double mfa_peak_gflops(int threads, int vector_bits, double milliseconds);

/* The same by dot products of pairs of bf16 (vdpbf16ps, bfdot), and by the tile registers of AMX; 0 if this machine has
 * none. */
EXPORT double mfa_peak_bf16_gflops(int threads, double milliseconds);
EXPORT double mfa_peak_tiles_gflops(int threads, double milliseconds);

/* 10^9 bytes a second, where the threads read two buffers once through, in pieces that each takes when it has done the
 * one before; 0 as above. */
EXPORT double mfa_peak_read_gbytes(const void *first, size_t first_bytes, const void *second, size_t second_bytes,
                                   int threads);

/* Starts threads that do nothing, without a pause, as those of another library's pool do while they wait for work; and
 * ends them. Returns how many were started. Not for several callers at once. */
EXPORT int mfa_peak_begin_spinning(int threads);
EXPORT void mfa_peak_end_spinning(void);

enum { MAX_THREADS = 1024, STEPS = 4096, CHUNK = 1 << 18 };

struct probe {
    /* Does a piece of work, and returns its size in operations or bytes; 0: there is none left. */
    double (*piece)(struct probe *probe);
    double seconds;
    int threads;
    atomic_int arrived; /* all threads begin together, else the first ones would run alone */
    const char *buffers[2];
    size_t bytes[2];
    atomic_size_t next; /* the piece of the buffers that is read next */
};

struct worker {
    struct probe *probe;
    double done, elapsed;
};

/* Independent sums, enough to hide the latency of a multiply-add on every unit, few enough to stay in
 * registers. The factor is volatile: the compiler must not work out the sums beforehand. */
static const volatile float factor = 0.5f;

#define DEFINE_PIECE(name, attributes, vector, count, broadcast, multiply_add, numbers)                       \
    attributes static double name(struct probe *probe)                                                        \
    {                                                                                                         \
        static _Thread_local volatile float kept;                                                             \
        const vector a = broadcast(factor), b = broadcast(factor);                                            \
        vector sums[count], total = a;                                                                        \
        _Pragma("GCC unroll 32") for (int n = 0; n < (count); n++) sums[n] = broadcast((float)n);             \
        for (int step = 0; step < STEPS; step++)                                                              \
            _Pragma("GCC unroll 32") for (int n = 0; n < (count); n++) sums[n] = multiply_add(a, b, sums[n]); \
        _Pragma("GCC unroll 32") for (int n = 0; n < (count); n++) total += sums[n];                          \
        kept = total[0];                                                                                      \
        (void)kept, (void)probe;                                                                              \
        return 2.0 * STEPS * (count) * (double)(sizeof(vector) / sizeof(float)) * (numbers);                  \
    }

#if defined(__x86_64__)
#define DOT(a, b, sum) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
DEFINE_PIECE(fma_512, __attribute__((target("avx512f"))), __m512, 12, _mm512_set1_ps, _mm512_fmadd_ps, 1)
DEFINE_PIECE(fma_256, __attribute__((target("avx2,fma"))), __m256, 12, _mm256_set1_ps, _mm256_fmadd_ps, 1)
DEFINE_PIECE(fma_128, __attribute__((target("avx2,fma"))), __m128, 12, _mm_set1_ps, _mm_fmadd_ps, 1)
/* 24 sums: an instruction takes 6 cycles, and two begin in each. */
DEFINE_PIECE(dots, __attribute__((target("avx512f,avx512bf16"))), __m512, 24, _mm512_set1_ps, DOT, 2)

/* The products of AMX: tiles of 16 x 16 sums, with 32 terms each. */
__attribute__((target("amx-tile,amx-bf16"))) static double tiles(struct probe *probe)
{
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } whole = {1, 0, {0}, {64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&whole);
    for (int step = 0; step < STEPS; step++) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_release();
    (void)probe;
    return 2.0 * STEPS * 4 * 16 * 16 * 32;
}
#elif defined(__aarch64__)
#define MULTIPLY_ADD(a, b, sum) vfmaq_f32(sum, a, b)
#define DOT(a, b, sum) vbfdotq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b))
DEFINE_PIECE(fma_128, , float32x4_t, 20, vdupq_n_f32, MULTIPLY_ADD, 1)
DEFINE_PIECE(dots, __attribute__((target("arch=armv8.2-a+bf16"))), float32x4_t, 20, vdupq_n_f32, DOT, 2)
#endif

static double (*fma_piece(int vector_bits))(struct probe *)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (vector_bits == 512 && __builtin_cpu_supports("avx512f"))
        return fma_512;
    if (vector_bits == 256 && __builtin_cpu_supports("fma"))
        return fma_256;
    if (vector_bits == 128 && __builtin_cpu_supports("fma"))
        return fma_128;
#elif defined(__aarch64__)
    if (vector_bits == 128)
        return fma_128;
#endif
    (void)vector_bits;
    return NULL;
}

static double (*dots_piece(void))(struct probe *)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") ? dots : NULL;
#elif defined(__aarch64__) && defined(__APPLE__)
    int present = 0;
    size_t size = sizeof present;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &present, &size, NULL, 0) == 0 && present ? dots : NULL;
#elif defined(__aarch64__) && defined(__linux__)
    const unsigned long hwcap2_bf16 = 1ul << 14;
    return getauxval(AT_HWCAP2) & hwcap2_bf16 ? dots : NULL;
#else
    return NULL;
#endif
}

static double read_piece(struct probe *probe)
{
    enum {
        SUMS = 8,      /* that every processor has registers for */
        FETCHED = 4096 /* bytes ahead: narrow loads alone keep too few lines under way */
    };
    typedef uint64_t lanes __attribute__((vector_size(16), aligned(8), may_alias));
    static _Thread_local volatile uint64_t kept;
    const size_t piece = atomic_fetch_add(&probe->next, 1), of_first = (probe->bytes[0] + CHUNK - 1) / CHUNK;
    const int which = piece >= of_first;
    const size_t begin = (piece - (which ? of_first : 0)) * CHUNK, size = probe->bytes[which];
    if (begin >= size)
        return 0;
    const size_t bytes = size - begin < CHUNK ? size - begin : CHUNK;
    const lanes *from = (const lanes *)(probe->buffers[which] + begin);
    lanes a = {0}, b = a, c = a, d = a, e = a, f = a, g = a, h = a;
    for (size_t n = 0; n + SUMS <= bytes / sizeof(lanes); n += SUMS, from += SUMS) {
        for (size_t line = 0; line < sizeof(lanes[SUMS]); line += 64)
            __builtin_prefetch((const char *)from + FETCHED + line);
        a ^= from[0], b ^= from[1], c ^= from[2], d ^= from[3];
        e ^= from[4], f ^= from[5], g ^= from[6], h ^= from[7];
    }
    a ^= b ^ c ^ d ^ e ^ f ^ g ^ h;
    kept = a[0];
    (void)kept;
    return (double)bytes;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct probe *probe = worker->probe;
    atomic_fetch_add(&probe->arrived, 1);
    while (atomic_load(&probe->arrived) < probe->threads)
        ;
    const double begin = now();
    do {
        const double size = probe->piece(probe);
        if (size == 0)
            break;
        worker->done += size;
        worker->elapsed = now() - begin;
    } while (worker->elapsed < probe->seconds);
    return NULL;
}

/* Runs the probe on its threads, of which the caller is one; 0 if it cannot be. */
static int run(struct probe *probe, struct worker workers[MAX_THREADS])
{
    pthread_t threads[MAX_THREADS];
    int started = 0;
    if (!probe->piece || probe->threads < 1 || probe->threads > MAX_THREADS)
        return 0;
    const int count = probe->threads;
    for (int n = 0; n < count; n++)
        workers[n] = (struct worker){.probe = probe};
    while (started < count - 1 && !pthread_create(&threads[started], NULL, work, &workers[started + 1]))
        started++;
    /* Not all threads could be started: counts the missing ones, for which the others would wait forever. */
    if (started < count - 1)
        atomic_fetch_add(&probe->arrived, count - 1 - started);
    work(&workers[0]);
    for (int n = 0; n < started; n++)
        pthread_join(threads[n], NULL);
    return started == count - 1;
}

/* The sum of what the threads do a second. */
static double sum_of_rates(struct probe probe)
{
    struct worker workers[MAX_THREADS];
    double rate = 0;
    if (!run(&probe, workers))
        return 0;
    for (int n = 0; n < probe.threads; n++)
        rate += workers[n].done / workers[n].elapsed;
    return 1e-9 * rate;
}

int mfa_peak_vector_bits(void)
{
    for (int bits = 512; bits >= 128; bits /= 2)
        if (fma_piece(bits))
            return bits;
    return 0;
}

double mfa_peak_gflops(int threads, int vector_bits, double milliseconds)
{
    return sum_of_rates(
        (struct probe){.piece = fma_piece(vector_bits), .seconds = 1e-3 * milliseconds, .threads = threads});
}

double mfa_peak_bf16_gflops(int threads, double milliseconds)
{
    return sum_of_rates((struct probe){.piece = dots_piece(), .seconds = 1e-3 * milliseconds, .threads = threads});
}

double mfa_peak_tiles_gflops(int threads, double milliseconds)
{
    struct probe probe = {.seconds = 1e-3 * milliseconds, .threads = threads};
#if defined(__x86_64__) && defined(__linux__)
    /* The system saves these registers for processes that have asked: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA. */
    __builtin_cpu_init();
    if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
        syscall(SYS_arch_prctl, 0x1023, 18) == 0)
        probe.piece = tiles;
#endif
    return sum_of_rates(probe);
}

double mfa_peak_read_gbytes(const void *first, size_t first_bytes, const void *second, size_t second_bytes, int threads)
{
    struct worker workers[MAX_THREADS];
    struct probe probe = {.piece = read_piece,
                          .seconds = HUGE_VAL,
                          .threads = threads,
                          .buffers = {first, second},
                          .bytes = {first_bytes, second_bytes}};
    double done = 0, longest = 0;
    if (!run(&probe, workers))
        return 0;
    for (int n = 0; n < threads; n++) {
        done += workers[n].done;
        longest = workers[n].elapsed > longest ? workers[n].elapsed : longest;
    }
    return longest > 0 ? 1e-9 * done / longest : 0;
}

static atomic_int spinning;
static pthread_t spinners[MAX_THREADS];
static int spinner_count;

static void *spin(void *argument)
{
    while (atomic_load_explicit(&spinning, memory_order_relaxed))
        ;
    return argument;
}

int mfa_peak_begin_spinning(int threads)
{
    atomic_store(&spinning, 1);
    while (spinner_count < threads && spinner_count < MAX_THREADS &&
           !pthread_create(&spinners[spinner_count], NULL, spin, NULL))
        spinner_count++;
    return spinner_count;
}

void mfa_peak_end_spinning(void)
{
    atomic_store(&spinning, 0);
    while (spinner_count > 0)
        pthread_join(spinners[--spinner_count], NULL);
}
