#define _GNU_SOURCE
#include "fiber.h"

#include <stdint.h>
#include <sys/mman.h>

#include "include/metalsim/abi.h"

#define GUARD 4096

#if defined(__x86_64__)
__asm__(".text\n"
        ".globl metalsim_fiber_switch\n"
        ".hidden metalsim_fiber_switch\n"
        ".type metalsim_fiber_switch, @function\n"
        "metalsim_fiber_switch:\n"
        "    push %rbp\n"
        "    push %rbx\n"
        "    push %r12\n"
        "    push %r13\n"
        "    push %r14\n"
        "    push %r15\n"
        "    mov %rsp, (%rdi)\n"
        "    mov %rsi, %rsp\n"
        "    pop %r15\n"
        "    pop %r14\n"
        "    pop %r13\n"
        "    pop %r12\n"
        "    pop %rbx\n"
        "    pop %rbp\n"
        "    ret\n"
        ".size metalsim_fiber_switch, .-metalsim_fiber_switch\n");
#define RETURN 6 /* of the frame's words, the return address */
#define FRAME 8  /* begin() finds its stack as if it had been called */
#elif defined(__aarch64__)
__asm__(".text\n"
        ".globl metalsim_fiber_switch\n"
        ".hidden metalsim_fiber_switch\n"
        ".type metalsim_fiber_switch, %function\n"
        "metalsim_fiber_switch:\n"
        "    stp x19, x20, [sp, #-160]!\n"
        "    stp x21, x22, [sp, #16]\n"
        "    stp x23, x24, [sp, #32]\n"
        "    stp x25, x26, [sp, #48]\n"
        "    stp x27, x28, [sp, #64]\n"
        "    stp x29, x30, [sp, #80]\n"
        "    stp d8, d9, [sp, #96]\n"
        "    stp d10, d11, [sp, #112]\n"
        "    stp d12, d13, [sp, #128]\n"
        "    stp d14, d15, [sp, #144]\n"
        "    mov x2, sp\n"
        "    str x2, [x0]\n"
        "    mov sp, x1\n"
        "    ldp x21, x22, [sp, #16]\n"
        "    ldp x23, x24, [sp, #32]\n"
        "    ldp x25, x26, [sp, #48]\n"
        "    ldp x27, x28, [sp, #64]\n"
        "    ldp x29, x30, [sp, #80]\n"
        "    ldp d8, d9, [sp, #96]\n"
        "    ldp d10, d11, [sp, #112]\n"
        "    ldp d12, d13, [sp, #128]\n"
        "    ldp d14, d15, [sp, #144]\n"
        "    ldp x19, x20, [sp], #160\n"
        "    ret\n"
        ".size metalsim_fiber_switch, .-metalsim_fiber_switch\n");
#define RETURN 11
#define FRAME 20
#else
#error "metalsim switches stacks on x86-64 and on aarch64 only"
#endif

void *metalsim_fiber_make(char *stack_end, void (*begin)(void))
{
    uintptr_t *frame = (uintptr_t *)((uintptr_t)stack_end & ~(uintptr_t)15) - FRAME;
    for (int i = 0; i < FRAME; i++)
        frame[i] = 0;
    frame[RETURN] = (uintptr_t)begin;
    return frame;
}

char *metalsim_fiber_map(size_t count)
{
    size_t bytes = (count + 1) * METALSIM_STACK;
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    char *stacks = memory + (METALSIM_STACK - (uintptr_t)memory % METALSIM_STACK) % METALSIM_STACK;
    char *end = stacks + count * METALSIM_STACK;
    if (stacks > memory)
        munmap(memory, (size_t)(stacks - memory));
    if (memory + bytes > end)
        munmap(end, (size_t)(memory + bytes - end));
    for (size_t i = 0; i < count; i++)
        mprotect(stacks + i * METALSIM_STACK, GUARD, PROT_NONE);
    return stacks;
}

void metalsim_fiber_unmap(char *stacks, size_t count)
{
    munmap(stacks, count * METALSIM_STACK);
}
