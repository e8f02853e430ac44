/* Messages: selectors, the classes by name, and objc_msgSend, which finds the function of a fact and jumps to it with
 * all arguments as they are. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/object.h"

const struct metalsim_class metalsim_metaclass = {NULL, "class", 0, NULL, NULL};

static const struct {
    const struct metalsim_class *class;
    int is_public;
} classes[] = {
#define CLASS(name, is_public) {&metalsim_class_##name, is_public},
#include "runtime/classes.inc"
#undef CLASS
};

static const struct metalsim_fact facts[] = {
#define OWNED 'o'
#define BORROWED 'b'
#define VALUE 'v'
#define DOCC(page) "developer.apple.com/documentation/" page
#define MPS(member) DOCC("metalperformanceshaders/mpscommandbuffer/" member)
#define MACIOS "github.com/dotnet/macios src/metal.cs"
#define OBJC2(file) "docs.rs/objc2-metal src/objc2_metal/generated/" file ".rs"
#define FOUNDATION "docs.rs/objc2-foundation"
#define ARC "clang.llvm.org/docs/AutomaticReferenceCounting.html"
#define FACT(class_name, kind, selector, ownership, since, result, function, types, source) \
    {#class_name, kind, selector, ownership, since, #result, #types, source, (void (*)(void))metalsim_##function},
#include "runtime/facts.inc"
#undef FACT
};
#define FACTS (sizeof facts / sizeof *facts)

const struct metalsim_fact *metalsim_runtime_fact(size_t i)
{
    return i < FACTS ? &facts[i] : NULL;
}

const struct metalsim_fact *metalsim_message_fact(const struct metalsim_class *class, char kind, SEL selector)
{
    for (size_t i = 0; i < FACTS; i++) {
        const struct metalsim_fact *fact = &facts[i];
        if (fact->kind == kind && !strcmp(fact->selector, selector) && fact->since <= 100 * metalsim_now.macos + 99 &&
            (!strcmp(fact->class_name, class->name) || !strcmp(fact->class_name, "NSObject") ||
             (class->acts_as && !strcmp(fact->class_name, class->acts_as))))
            return fact;
    }
    return NULL;
}

/* --- Selectors and classes ------------------------------------------------------------------------ */

#define SELECTORS 512

METALSIM_EXPORT SEL sel_registerName(const char *name);
SEL sel_registerName(const char *name)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static const char *known[SELECTORS];
    size_t i = 0;
    pthread_mutex_lock(&lock);
    while (i < SELECTORS && known[i] && strcmp(known[i], name))
        i++;
    if (i < SELECTORS && !known[i])
        known[i] = strdup(name);
    const char *found = i < SELECTORS ? known[i] : NULL;
    pthread_mutex_unlock(&lock);
    if (!found)
        abort();
    return found;
}

METALSIM_EXPORT id objc_getClass(const char *name);
id objc_getClass(const char *name)
{
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++)
        if (classes[i].is_public && !strcmp(classes[i].class->name, name))
            return (id)classes[i].class;
    return NULL;
}

/* --- Sending -------------------------------------------------------------------------------------- */

static uintptr_t answer_nothing(void)
{
    return 0;
}

/* Called by objc_msgSend: the function to jump to. */
void (*metalsim_message_find(id receiver, SEL selector))(void);
void (*metalsim_message_find(id receiver, SEL selector))(void)
{
    METALSIM_COUNT(messages);
    const int to_class = receiver->isa == &metalsim_metaclass;
    const struct metalsim_class *class = to_class ? (const struct metalsim_class *)receiver : receiver->isa;
    const struct metalsim_fact *fact = metalsim_message_fact(class, to_class ? '+' : '-', selector);
    if (!fact)
        metalsim_find("unrecognized selector %c[%s %s], as of macOS %d", to_class ? '+' : '-', class->name, selector,
                      metalsim_now.macos);
    else if (!to_class && atomic_load(&receiver->references) <= 0)
        metalsim_find("-[%s %s] is sent to an object that is gone%s", class->name, selector,
                      strcmp(selector, "release") ? "" : ": it is released once too often");
    else
        return fact->function;
    return (void (*)(void))answer_nothing;
}

#if defined(__x86_64__)
__asm__(".text\n.globl objc_msgSend\n.type objc_msgSend, @function\n"
        "objc_msgSend:\n"
        "    testq %rdi, %rdi\n    jz 1f\n"
        "    pushq %rbp\n    movq %rsp, %rbp\n    subq $192, %rsp\n"
        "    movq %rdi, (%rsp)\n    movq %rsi, 8(%rsp)\n    movq %rdx, 16(%rsp)\n    movq %rcx, 24(%rsp)\n"
        "    movq %r8, 32(%rsp)\n    movq %r9, 40(%rsp)\n    movq %rax, 48(%rsp)\n"
        "    movups %xmm0, 64(%rsp)\n    movups %xmm1, 80(%rsp)\n    movups %xmm2, 96(%rsp)\n"
        "    movups %xmm3, 112(%rsp)\n    movups %xmm4, 128(%rsp)\n    movups %xmm5, 144(%rsp)\n"
        "    movups %xmm6, 160(%rsp)\n    movups %xmm7, 176(%rsp)\n"
        "    call metalsim_message_find\n    movq %rax, %r11\n"
        "    movq (%rsp), %rdi\n    movq 8(%rsp), %rsi\n    movq 16(%rsp), %rdx\n    movq 24(%rsp), %rcx\n"
        "    movq 32(%rsp), %r8\n    movq 40(%rsp), %r9\n    movq 48(%rsp), %rax\n"
        "    movups 64(%rsp), %xmm0\n    movups 80(%rsp), %xmm1\n    movups 96(%rsp), %xmm2\n"
        "    movups 112(%rsp), %xmm3\n    movups 128(%rsp), %xmm4\n    movups 144(%rsp), %xmm5\n"
        "    movups 160(%rsp), %xmm6\n    movups 176(%rsp), %xmm7\n"
        "    leave\n    jmp *%r11\n"
        "1:  xorl %eax, %eax\n    xorl %edx, %edx\n    pxor %xmm0, %xmm0\n    ret\n"
        ".size objc_msgSend, . - objc_msgSend\n");
#elif defined(__aarch64__)
__asm__(".text\n.globl objc_msgSend\n.type objc_msgSend, %function\n"
        "objc_msgSend:\n"
        "    cbz x0, 1f\n"
        "    stp x29, x30, [sp, #-16]!\n    mov x29, sp\n    sub sp, sp, #208\n"
        "    stp x0, x1, [sp]\n    stp x2, x3, [sp, #16]\n    stp x4, x5, [sp, #32]\n"
        "    stp x6, x7, [sp, #48]\n    str x8, [sp, #64]\n"
        "    stp q0, q1, [sp, #80]\n    stp q2, q3, [sp, #112]\n"
        "    stp q4, q5, [sp, #144]\n    stp q6, q7, [sp, #176]\n"
        "    bl metalsim_message_find\n    mov x16, x0\n"
        "    ldp x0, x1, [sp]\n    ldp x2, x3, [sp, #16]\n    ldp x4, x5, [sp, #32]\n"
        "    ldp x6, x7, [sp, #48]\n    ldr x8, [sp, #64]\n"
        "    ldp q0, q1, [sp, #80]\n    ldp q2, q3, [sp, #112]\n"
        "    ldp q4, q5, [sp, #144]\n    ldp q6, q7, [sp, #176]\n"
        "    mov sp, x29\n    ldp x29, x30, [sp], #16\n    br x16\n"
        "1:  mov x1, #0\n    movi v0.2d, #0\n    ret\n"
        ".size objc_msgSend, . - objc_msgSend\n");
#endif
