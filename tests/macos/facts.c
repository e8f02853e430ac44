/* The facts about macOS in tools/macos/sdk, as static assertions: this file compiles with that SDK, and on a Mac with
 * Apple's own. If one of the two does not compile, ours is wrong. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysctl.h>
#include <time.h>
#include <unistd.h>
#include <xlocale.h>

#define FACT(fact) _Static_assert(fact, #fact)

FACT(sizeof(pthread_t) == 8 && sizeof(pthread_attr_t) == 64);
FACT(sizeof(pthread_mutex_t) == 64 && sizeof(pthread_mutexattr_t) == 16);
FACT(PTHREAD_CANCEL_DISABLE == 0 && PTHREAD_CANCEL_ENABLE == 1);
FACT(sizeof(pthread_cond_t) == 48 && sizeof(pthread_condattr_t) == 16);

FACT(sizeof(struct stat) == 144 && sizeof(mode_t) == 2 && sizeof(off_t) == 8);
FACT(offsetof(struct stat, st_mode) == 4 && sizeof((struct stat){0}.st_mode) == 2);
FACT(offsetof(struct stat, st_size) == 96 && sizeof((struct stat){0}.st_size) == 8);
FACT(S_ISDIR(0040755) && !S_ISDIR(0100644) && S_ISREG(0100644) && !S_ISREG(0040755));

FACT(sizeof(sigset_t) == 4 && SIG_SETMASK == 3);
FACT(SIGILL == 4 && SIGTRAP == 5 && SIGABRT == 6 && SIGFPE == 8 && SIGBUS == 10 && SIGSEGV == 11 && SIGSYS == 12);

FACT(O_RDONLY == 0 && O_NONBLOCK == 4 && O_CLOEXEC == 0x1000000);
FACT(EINTR == 4);

FACT(sizeof(struct timespec) == 16 && sizeof(time_t) == 8 && sizeof(clockid_t) == 4 && CLOCK_MONOTONIC == 6);
FACT(offsetof(struct timespec, tv_nsec) == 8);

FACT(LC_NUMERIC_MASK == 16 && sizeof(locale_t) == 8);
FACT(RTLD_NOW == 2 && RTLD_LOCAL == 4);
FACT(sizeof(Dl_info) == 32 && offsetof(Dl_info, dli_sname) == 16);
FACT(sizeof(PRId64) == sizeof "lld" && sizeof(int64_t) == sizeof(long long));
FACT(sizeof(size_t) == 8 && sizeof(ssize_t) == 8);

/* A second prototype must agree with the first. In parentheses a name is no macro of Apple's. */
int *__error(void);
int close(int);
void *dlopen(const char *, int);
void *dlsym(void *, const char *);
int fstat(int, struct stat *);
char *mkdtemp(char *);
int mkstemp(char *);
locale_t newlocale(int, const char *, locale_t);
int open(const char *, int, ...);
int pthread_atfork(void (*)(void), void (*)(void), void (*)(void));
int pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int pthread_setcancelstate(int, int *);
int pthread_sigmask(int, const sigset_t *, sigset_t *);
int(sigdelset)(sigset_t *, int);
int(sigfillset)(sigset_t *);
int(snprintf)(char *, size_t, const char *, ...);
int stat(const char *, struct stat *);
int sysctlbyname(const char *, void *, size_t *, void *, size_t);
