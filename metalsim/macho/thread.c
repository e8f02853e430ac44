#include "thread.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "format.h"

void macho_threads_extend(struct macho_threads *threads, unsigned char *begin, size_t size)
{
    if (size == 0)
        return;
    if (threads->size == 0) {
        threads->initial = begin;
        if (pthread_key_create(&threads->key, free) != 0)
            abort();
    }
    threads->size = (size_t)(begin + size - threads->initial);
}

__attribute__((used)) static void *find(const struct thread_variable *variable)
{
    const struct macho_threads *threads = variable->image;
    unsigned char *block = pthread_getspecific(threads->key);
    if (!block) {
        block = aligned_alloc(64, (threads->size + 63) / 64 * 64);
        if (!block || pthread_setspecific(threads->key, block) != 0)
            abort();
        memcpy(block, threads->initial, threads->size);
    }
    return block + variable->offset;
}

__asm__(".text\n"
        ".globl macho_thread_find\n"
        ".type macho_thread_find, %function\n"
        "macho_thread_find:\n"
        "    stp x29, x30, [sp, #-160]!\n"
        "    stp x1, x2, [sp, #16]\n"
        "    stp x3, x4, [sp, #32]\n"
        "    stp x5, x6, [sp, #48]\n"
        "    stp x7, x8, [sp, #64]\n"
        "    stp x9, x10, [sp, #80]\n"
        "    stp x11, x12, [sp, #96]\n"
        "    stp x13, x14, [sp, #112]\n"
        "    stp x15, x16, [sp, #128]\n"
        "    str x17, [sp, #144]\n"
        "    sub sp, sp, #512\n"
        "    stp q0, q1, [sp]\n"
        "    stp q2, q3, [sp, #32]\n"
        "    stp q4, q5, [sp, #64]\n"
        "    stp q6, q7, [sp, #96]\n"
        "    stp q8, q9, [sp, #128]\n"
        "    stp q10, q11, [sp, #160]\n"
        "    stp q12, q13, [sp, #192]\n"
        "    stp q14, q15, [sp, #224]\n"
        "    stp q16, q17, [sp, #256]\n"
        "    stp q18, q19, [sp, #288]\n"
        "    stp q20, q21, [sp, #320]\n"
        "    stp q22, q23, [sp, #352]\n"
        "    stp q24, q25, [sp, #384]\n"
        "    stp q26, q27, [sp, #416]\n"
        "    stp q28, q29, [sp, #448]\n"
        "    stp q30, q31, [sp, #480]\n"
        "    bl find\n"
        "    ldp q0, q1, [sp]\n"
        "    ldp q2, q3, [sp, #32]\n"
        "    ldp q4, q5, [sp, #64]\n"
        "    ldp q6, q7, [sp, #96]\n"
        "    ldp q8, q9, [sp, #128]\n"
        "    ldp q10, q11, [sp, #160]\n"
        "    ldp q12, q13, [sp, #192]\n"
        "    ldp q14, q15, [sp, #224]\n"
        "    ldp q16, q17, [sp, #256]\n"
        "    ldp q18, q19, [sp, #288]\n"
        "    ldp q20, q21, [sp, #320]\n"
        "    ldp q22, q23, [sp, #352]\n"
        "    ldp q24, q25, [sp, #384]\n"
        "    ldp q26, q27, [sp, #416]\n"
        "    ldp q28, q29, [sp, #448]\n"
        "    ldp q30, q31, [sp, #480]\n"
        "    add sp, sp, #512\n"
        "    ldp x1, x2, [sp, #16]\n"
        "    ldp x3, x4, [sp, #32]\n"
        "    ldp x5, x6, [sp, #48]\n"
        "    ldp x7, x8, [sp, #64]\n"
        "    ldp x9, x10, [sp, #80]\n"
        "    ldp x11, x12, [sp, #96]\n"
        "    ldp x13, x14, [sp, #112]\n"
        "    ldp x15, x16, [sp, #128]\n"
        "    ldr x17, [sp, #144]\n"
        "    ldp x29, x30, [sp], #160\n"
        "    ret\n"
        ".size macho_thread_find, .-macho_thread_find\n");
