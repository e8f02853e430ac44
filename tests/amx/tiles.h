/* AMX in software, for machines without it: included before the kernels for AMX, it puts functions in the place of the
 * instructions that they use. They do what Intel's manual says of these (Software Developer's Manual, volume 2), and
 * stop the program where the processor would raise an exception. */
#ifndef TESTS_AMX_TILES_H
#define TESTS_AMX_TILES_H

#include <immintrin.h>
#include <stddef.h>

void tiles_configure(const void *config);
void tiles_release(void);
void tiles_zero(int tile);
void tiles_load(int tile, const void *from, size_t stride);
void tiles_store(int tile, void *to, size_t stride);
void tiles_add_product(int sums, int a, int b);

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) tiles_configure(config)
#define _tile_release() tiles_release()
#define _tile_zero(tile) tiles_zero(tile)
#define _tile_loadd(tile, from, stride) tiles_load(tile, from, stride)
#define _tile_stored(tile, to, stride) tiles_store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) tiles_add_product(sums, a, b)

#endif
