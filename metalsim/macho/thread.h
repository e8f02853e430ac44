/* The thread-local variables of an image. The compiler's code finds one by calling the function whose address stands
 * in its descriptor; that function may change no register but x0, which is why it is written in assembly. */
#ifndef MACHO_THREAD_H
#define MACHO_THREAD_H

#include <pthread.h>
#include <stddef.h>

struct macho_threads {
    unsigned char *initial; /* what a thread's block begins as */
    size_t size;
    pthread_key_t key; /* the thread's block; made when `size` is not 0 any more */
};

/* The block grows to hold a section too: they lie one after the other. */
void macho_threads_extend(struct macho_threads *threads, unsigned char *begin, size_t size);

/* The import __tlv_bootstrap. */
void macho_thread_find(void);

#endif
