/* VECTORIZE before the functions in which tests spend most of their time: GCC compiles them for AVX2, too, with all
 * that they call in their file. Not for FMA: both give the same bits. */
#ifndef REFERENCE_VECTORIZE_H
#define REFERENCE_VECTORIZE_H

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define VECTORIZE __attribute__((flatten, target_clones("avx2", "default")))
#else
#define VECTORIZE
#endif

#endif
