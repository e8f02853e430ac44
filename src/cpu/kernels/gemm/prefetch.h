/* Prefetching: a cursor walks over rows of memory that will be read soon, in the order in which they lie. A product
 * moves it on evenly, by so much for each pack of A that it reads, since what is fetched at once fills the buffers of
 * the misses. Who makes a cursor knows what comes next (attention/kv_source.h); products know no addresses. */
struct prefetch_cursor {
    const char *at, *end;   /* of a row */
    int64_t bytes, gap;     /* of a row; from its end to the next */
    int64_t bytes_per_pack; /* for each pack of A */
};

static inline __attribute__((always_inline)) void prefetch_next(struct prefetch_cursor *cursor, int64_t packs)
{
    __builtin_prefetch(cursor->at, 0, 2); /* into the second-level cache */
    cursor->at += packs * cursor->bytes_per_pack;
    if (cursor->at >= cursor->end) {
        cursor->at += cursor->gap;
        cursor->end += cursor->gap + cursor->bytes;
    }
}

/* The same for products too short to spread it: a prefetch for each line. */
static inline void prefetch_all(struct prefetch_cursor *cursor, int64_t packs)
{
    const int64_t line = cursor->gap && cursor->bytes < 64 ? cursor->bytes : 64, each = cursor->bytes_per_pack;
    for (int64_t rest = packs * each; rest > 0; rest -= line) {
        cursor->bytes_per_pack = rest < line ? rest : line;
        prefetch_next(cursor, 1);
    }
    cursor->bytes_per_pack = each;
}

/* The next `bytes`, a constant, two lines at a time: rows that are not whole pairs of lines are fetched in part. Into
 * the first-level cache. */
static inline __attribute__((always_inline)) void prefetch_lines(struct prefetch_cursor *cursor, const int64_t bytes)
{
    _Pragma("GCC unroll 8") for (int64_t done = 0; done < bytes; done += 128)
    {
        __builtin_prefetch(cursor->at, 0, 3);
        if (bytes - done > 64)
            __builtin_prefetch(cursor->at + 64, 0, 3);
        cursor->at += bytes - done < 128 ? bytes - done : 128;
        if (cursor->at >= cursor->end) {
            cursor->at += cursor->gap;
            cursor->end += cursor->gap + cursor->bytes;
        }
    }
}
