/* libSystem for a library that the loader has opened: the functions that libmfa imports. Most are Linux's own, since
 * both systems pass integers, pointers and doubles alike. The rest differ in a struct, a number or in how they take
 * variable arguments, which on Apple's arm64 all lie on the stack. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "macho.h"
#include "thread.h"

struct macho_libraries macho_libraries;

/* Ends the program if libmfa asks for what macOS does not know, or what it is not known to ask for. */
static void require(int sound, const char *what)
{
    if (sound)
        return;
    printf("libmfa calls the system with %s\n", what);
    fflush(stdout);
    abort();
}

/* --- Variable arguments --------------------------------------------------------------------------- */

/* Apple's va_list is the address of the first argument, and each takes 8 bytes. That is what a va_list of Linux looks
 * like from which all arguments in registers have been taken. */
__attribute__((used)) static int print(char *text, size_t capacity, const char *format, void *arguments)
{
    struct {
        void *stack, *general, *vector;
        int general_left, vector_left;
    } list = {arguments, NULL, NULL, 0, 0};
    va_list values;
    _Static_assert(sizeof list == sizeof values, "a va_list of AAPCS64");
    memcpy(&values, &list, sizeof values);
    return vsnprintf(text, capacity, format, values);
}

int macho_snprintf(char *text, size_t capacity, const char *format, ...);

__asm__(".text\n"
        ".type macho_snprintf, %function\n"
        "macho_snprintf:\n"
        "    mov x3, sp\n"
        "    b print\n"
        ".size macho_snprintf, .-macho_snprintf\n");

/* Apple's numbers for open(); what libmfa creates, mkstemp creates. */
static int open_file(const char *path, int flags)
{
    enum { READ_ONLY = 0, DO_NOT_WAIT = 0x4, CLOSE_ON_EXEC = 0x1000000 };
    require(flags == (READ_ONLY | DO_NOT_WAIT | CLOSE_ON_EXEC), "flags of open() that are not those of reading");
    return open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
}

/* --- Structs and numbers -------------------------------------------------------------------------- */

struct apple_stat {
    int32_t device;
    uint16_t mode, links;
    uint64_t file;
    uint32_t user, group;
    int32_t special;
    struct timespec times[4];
    int64_t size, blocks;
    int32_t block_size;
    uint32_t flags, generation;
    int32_t spare;
    int64_t spares[2];
};

static int tell(int status, const struct stat *found, struct apple_stat *filled)
{
    memset(filled, 0xa5, sizeof *filled);    /* who reads what is not set below shall notice */
    filled->mode = (uint16_t)found->st_mode; /* the bits are the same */
    filled->size = found->st_size;
    return status;
}

static int stat_path(const char *path, struct apple_stat *filled)
{
    struct stat found = {0};
    return tell(stat(path, &found), &found, filled);
}

static int stat_file(int file, struct apple_stat *filled)
{
    struct stat found = {0};
    return tell(fstat(file, &found), &found, filled);
}

static int make_folder(const char *path, uint16_t mode)
{
    return mkdir(path, mode);
}

static int read_clock(unsigned clock, struct timespec *time)
{
    enum { MONOTONIC = 6 };
    require(clock == MONOTONIC, "a clock that is not macOS's monotonic one");
    return clock_gettime(CLOCK_MONOTONIC, time);
}

static locale_t make_locale(int mask, const char *name, locale_t base)
{
    enum { NUMERIC = 1 << 4 };
    require(mask == NUMERIC, "a category of locales that is not LC_NUMERIC");
    return newlocale(LC_NUMERIC_MASK, name, base);
}

/* The environment's MACHO_M1: a Mac whose CPU has neither FEAT_BF16 nor FEAT_I8MM. */
static int read_control(const char *name, void *value, size_t *size, const void *set, size_t set_size)
{
    static const int processors = 2;
    const unsigned long has = getenv("MACHO_M1") ? 0 : getauxval(AT_HWCAP2);
    const int bf16 = (has & HWCAP2_BF16) != 0, i8mm = (has & HWCAP2_I8MM) != 0;
    const struct {
        const char *name;
        const void *value;
        size_t size;
    } controls[] = {{"hw.ncpu", &processors, sizeof processors},
                    {"hw.perflevel0.physicalcpu", &processors, sizeof processors},
                    {"hw.optional.arm.FEAT_BF16", &bf16, sizeof bf16},
                    {"hw.optional.arm.FEAT_I8MM", &i8mm, sizeof i8mm},
                    {"kern.osversion", "23A344", sizeof "23A344"}};
    (void)set_size;
    for (size_t n = 0; n < sizeof controls / sizeof *controls; n++)
        if (!strcmp(name, controls[n].name) && !set && *size >= controls[n].size) {
            memcpy(value, controls[n].value, controls[n].size);
            *size = controls[n].size;
            return 0;
        }
    errno = ENOENT;
    return -1;
}

/* Apple asks for a multiple; Linux would not mind. */
static void *allocate_aligned(size_t alignment, size_t size)
{
    if (size % alignment != 0) {
        errno = EINVAL;
        return NULL;
    }
    return aligned_alloc(alignment, size);
}

static void fill_pattern(void *memory, const void *pattern, size_t size)
{
    for (size_t at = 0; at < size; at += 16)
        memcpy((char *)memory + at, pattern, size - at < 16 ? size - at : 16);
}

/* --- Threads and signals -------------------------------------------------------------------------- */

/* Apple's objects have room for those of Linux, which thus live in them. */
enum { MUTEX = 64, CONDITION = 48 };
_Static_assert(sizeof(pthread_mutex_t) <= MUTEX && sizeof(pthread_cond_t) <= CONDITION && sizeof(pthread_t) == 8,
               "room");

static int start_thread(pthread_t *thread, const void *attributes, void *(*start)(void *), void *argument)
{
    require(!attributes, "attributes of a thread");
    return pthread_create(thread, NULL, start, argument);
}

static int make_mutex(pthread_mutex_t *mutex, const void *attributes)
{
    require(!attributes, "attributes of a mutex");
    memset(mutex, 0xa5, MUTEX); /* macOS may write all of it */
    return pthread_mutex_init(mutex, NULL);
}

static int make_condition(pthread_cond_t *condition, const void *attributes)
{
    require(!attributes, "attributes of a condition");
    return pthread_cond_init(condition, NULL);
}

/* Apple's numbers of the two states are those of Linux the other way round. */
static int set_cancellation(int state, int *before)
{
    enum { DISABLED = 0, ENABLED = 1 };
    int was;
    require(state == DISABLED || state == ENABLED, "a state of cancellation that there is not");
    const int error = pthread_setcancelstate(state ? PTHREAD_CANCEL_ENABLE : PTHREAD_CANCEL_DISABLE, &was);
    if (before)
        *before = was == PTHREAD_CANCEL_ENABLE ? ENABLED : DISABLED;
    return error;
}

/* A set is 32 bits, signal n being bit n - 1. */
static int fill_signals(uint32_t *set)
{
    *set = UINT32_MAX;
    return 0;
}

static int drop_signal(uint32_t *set, int number)
{
    *set &= ~(UINT32_C(1) << (number - 1));
    return 0;
}

/* What libmfa does, and no more: hides all but the faults for a while, then puts back what was. A set of Linux has no
 * room in one of Apple's, which gets a mark; what was is kept here. */
static int mask_signals(int how, const uint32_t *set, uint32_t *before)
{
    enum { SET = 3, MARK = 0x1a2b3c4d };
    static const int faults[] = {SIGILL, SIGTRAP, SIGABRT, SIGFPE, SIGBUS, SIGSEGV, SIGSYS};
    static const int apples[] = {4, 5, 6, 8, 10, 11, 12};
    static _Thread_local sigset_t was;
    require(how == SET && set, "a way to mask signals that is not SIG_SETMASK");
    if (!before) {
        require(*set == MARK, "a set of signals that it was not given");
        return pthread_sigmask(SIG_SETMASK, &was, NULL);
    }
    sigset_t hidden;
    uint32_t expected = UINT32_MAX;
    sigfillset(&hidden);
    for (size_t n = 0; n < sizeof faults / sizeof *faults; n++) {
        drop_signal(&expected, apples[n]);
        sigdelset(&hidden, faults[n]);
    }
    require(*set == expected, "a set of signals that is not all but the faults");
    *before = MARK;
    return pthread_sigmask(SIG_SETMASK, &hidden, &was);
}

/* --- Other libraries ------------------------------------------------------------------------------ */

static void *open_library(const char *path, int mode)
{
    (void)mode;
    return macho_libraries.open && path ? macho_libraries.open(path) : NULL;
}

static void *find_symbol(void *library, const char *name)
{
    enum { EVERYWHERE = -2 }; /* Apple's RTLD_DEFAULT */
    return macho_libraries.find ? macho_libraries.find((intptr_t)library == EVERYWHERE ? NULL : library, name) : NULL;
}

/* Apple's struct is that of Linux; the symbol nearest to the address is not looked for. */
static int find_file(const void *address, Dl_info *found)
{
    *found = (Dl_info){.dli_fname = macho_file_of(address)};
    return found->dli_fname != NULL;
}

/* --- The list ------------------------------------------------------------------------------------- */

static uint64_t stack_guard = UINT64_C(0x5bd1e9955bd1e995);

static void fail_stack(void)
{
    static const char text[] = "the stack of libmfa was overwritten\n";
    if (write(2, text, sizeof text - 1) < 0)
        _exit(3);
    abort();
}

typedef void function(void);

static const struct {
    const char *symbol;
    function *function;
} functions[] = {
#define SAME(name) {"_" #name, (function *)name}
    SAME(bzero),
    SAME(calloc),
    SAME(close),
    SAME(exp),
    SAME(exp2),
    SAME(fabs),
    SAME(free),
    SAME(freelocale),
    SAME(frexp),
    SAME(getcwd),
    SAME(getenv),
    SAME(ldexp),
    SAME(log),
    SAME(malloc),
    SAME(memcmp),
    SAME(memcpy),
    SAME(memmove),
    SAME(memset),
    SAME(mkdtemp),
    SAME(mkstemp),
    SAME(nanosleep),
    SAME(pthread_atfork),
    SAME(pthread_cond_broadcast),
    SAME(pthread_cond_destroy),
    SAME(pthread_cond_signal),
    SAME(pthread_cond_wait),
    SAME(pthread_join),
    SAME(pthread_mutex_destroy),
    SAME(pthread_mutex_lock),
    SAME(pthread_mutex_unlock),
    SAME(read),
    SAME(realloc),
    SAME(remove),
    SAME(rename),
    SAME(rmdir),
    SAME(sched_yield),
    SAME(sqrt),
    SAME(strchr),
    SAME(strcmp),
    SAME(strcspn),
    SAME(strdup),
    SAME(strlen),
    SAME(strncmp),
    SAME(strrchr),
    SAME(strspn),
    SAME(strstr),
    SAME(strtod),
    SAME(strtoll),
    SAME(tanh),
    SAME(unlink),
    SAME(uselocale),
    SAME(write),
#undef SAME
    {"___error", (function *)__errno_location}, /* the numbers that libmfa looks for are the same */
    {"___stack_chk_fail", fail_stack},
    {"__tlv_bootstrap", macho_thread_find},
    {"_aligned_alloc", (function *)allocate_aligned},
    {"_clock_gettime", (function *)read_clock},
    {"_dladdr", (function *)find_file},
    {"_dlopen", (function *)open_library},
    {"_dlsym", (function *)find_symbol},
    {"_fstat", (function *)stat_file},
    {"_memset_pattern16", (function *)fill_pattern},
    {"_mkdir", (function *)make_folder},
    {"_newlocale", (function *)make_locale},
    {"_open", (function *)open_file},
    {"_pthread_cond_init", (function *)make_condition},
    {"_pthread_create", (function *)start_thread},
    {"_pthread_mutex_init", (function *)make_mutex},
    {"_pthread_setcancelstate", (function *)set_cancellation},
    {"_pthread_sigmask", (function *)mask_signals},
    {"_sigdelset", (function *)drop_signal},
    {"_sigfillset", (function *)fill_signals},
    {"_snprintf", (function *)macho_snprintf},
    {"_stat", (function *)stat_path},
    {"_sysctlbyname", (function *)read_control},
    {"_vsnprintf", (function *)print},
};

void *macho_system(const char *symbol)
{
    if (!strcmp(symbol, "___stack_chk_guard"))
        return &stack_guard;
    for (size_t n = 0; n < sizeof functions / sizeof *functions; n++)
        if (!strcmp(symbol, functions[n].symbol))
            return (void *)functions[n].function;
    return NULL;
}
